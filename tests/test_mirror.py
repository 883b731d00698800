"""tests/ mirrors bpo/ and kernels/: tests/<room>/test_<module>[_<aspect>].py tests bpo/<room>/<module>.py."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import SLOW_FILES

ROOT = Path(__file__).resolve().parent.parent

# Test files and folders that are not of one module, and their subject.
WHOLE = {
    "benchmarks": "the scripts in benchmarks/",
    "cluster": "Slurm jobs on a private cluster",
    "gpu": "kernels, attention and transfers on a GPU",
    "kernels/test_triton_interpreter.py": "all kernels in Triton's interpreter",
    "test_continuity.py": "a run across interruptions",
    "test_ds_configs.py": "ds_configs/",
    "test_end_to_end.py": "all commands in sequence",
    "test_environment.py": "Makefile, .ci/venv, setup.py",
    "test_layout.py": "layout and imports",
    "test_mirror.py": "this table",
    "test_offline.py": "benchmarks/offline/",
    "test_pairwise.py": "tests/pairwise.py",
    "test_readme.py": "README.md",
    "test_recipes.py": "bpo/recipes/",
    "test_slurm_scripts.py": "slurm/",
    "test_soak.py": "tests/soak.py",
    "test_loss_types.py": "every registered loss in a whole run",
    "test_term_gradients.py": "lists of loss terms, however a batch is divided",
    "test_view_cost.py": "what views, references and second targets cost in a run",
}
# Test file -> modules without a test file of their own that it covers, relative to its room unless they start with /.
COVERS = {
    "bootstrap/job/test_leases.py": "progress queue",
    "bootstrap/job/test_merge.py": "balance outcomes statistics",
    "bootstrap/measure/test_blind.py": "donors model_journal",
    "bootstrap/measure/test_command.py": "quick report",
    "bootstrap/measure/test_text.py": "advice",
    "bootstrap/select/test_balancer.py": "differences selection weights",
    "bootstrap/test_run.py": "completion_types engines/models job/broken_images sources",
    "bootstrap/test_weaken.py": "engines/vision",
    "bootstrap/whole_set/test_edit.py": "slots",
    "bootstrap/whole_set/test_swap.py": "content images items outcomes permute takers",
    "checkpoint/test_fidelity.py": "/bpo/config/export",
    "checkpoint/test_files.py": "partition shards",
    "model/levers/test_install.py": "choice",
    "config/test_io.py": "bootstrap decoding evaluation foreign judge loss measure negatives online options rank "
    "rounds select selection server tracking training vision",
    "recipes/test_rounds.py": "/bpo/tools/demo/rounds",
    "rounds/test_run.py": "stages",
    "data/families/test_families.py": "base gemma idefics internvl llava qwen",
    "data/test_cells.py": "pairs token_weights",
    "evaluation/benchmarks/test_amber_generative.py": "amber_files",
    "evaluation/judge/test_ratings.py": "rule",
    "evaluation/judge/test_run.py": "models replies requests rules",
    "evaluation/test_run.py": "provenance results",
    "evaluation/test_suite.py": "/bpo/config/entry",
    "formats/importers/test_arrow.py": "shards",
    "formats/test_compressed.py": "importers/expansion",
    "formats/importers/test_registry.py": "containers csvfiles llava preferences tables",
    "formats/test_check.py": "examine usable",
    "formats/test_convert.py": "exporters fields image_folder schema",
    "formats/test_images.py": "embedded",
    "formats/test_messages.py": "markers",
    "formats/test_reading_bad_input.py": "bad_records jsonfiles jsonscan problems",
    "job/test_rendezvous.py": "one_process",
    "job/test_signals.py": "guard",
    "kernels/bench/test_aot.py": "aot_cases",
    "kernels/test_bench.py": "bench/cases bench/command bench/measure bench/providers",
    "kernels/test_chunks.py": "head plain_head",
    "kernels/test_dispatch.py": "checks",
    "kernels/test_linear_logprob.py": "fused_logprob",
    "kernels/test_logprob_rows.py": "online_softmax",
    "kernels/test_lora.py": "lora_kernels lora_operator philox plain_lora",
    "kernels/test_preference_loss.py": "preference_kernels",
    "kernels/test_provenance.py": "/bpo/job/run_record",
    "losses/test_plugin.py": "/bpo/job/plugins",
    "model/attention/test_shared_prefix.py": "sdpa",
    "model/attention/test_varlen.py": "flash rows",
    "model/levers/test_lora.py": "lora_layers",
    "model/levers/test_quantized.py": "fp8 quantized_layers",
    "model/decoding/test_answer.py": "cost",
    "model/decoding/test_contrast.py": "biased branch",
    "model/reference/test_store.py": "format",
    "model/test_inference.py": "/bpo/config/adapter",
    "ranking/judges/test_claims.py": "models",
    "ranking/test_run.py": "judge options judges/registry",
    "test_layout.py": "__init__",
    "test_train.py": "training/report",
    "test_term_gradients.py": "training/across_groups training/loss_state model/reference/cells",
    "tools/bench/test_levers.py": "lever_table",
    "tools/bench/test_step.py": "bpo_provider case meter report synthetic trl_provider workers",
    "tools/demo/test_base.py": "tower vocabulary",
    "tools/demo/test_report.py": "/bpo/tools/charts",
    "tools/demo/test_run.py": "environment gallery recipe training",
    "tools/demo/test_world.py": "files rewriting sprites",
    "tools/plan/test_command.py": "candidates",
    "tools/plan/test_memory.py": "live_bytes",
    "tools/plan/test_shape.py": "shapes",
    "tools/view/test_measures.py": "/bpo/tools/measure_plots /bpo/tools/measures",
    "tools/view/test_page.py": "build entries pictures plots summary",
    "tools/view/test_serve.py": "run",
    "training/online/test_steps.py": "generate reference /bpo/tools/refs_follow",
    "training/test_flops.py": "/bpo/data/useful_work",
    "training/test_metrics.py": "hardware",
    "formats/test_files.py": "/bpo/records",
}


def room_of(test: str) -> Path:
    """`model/test_head.py` -> bpo/model; `kernels/test_chunks.py` -> kernels."""
    folder = Path(test).parent
    return folder if folder.parts[:1] == ("kernels",) else Path("bpo") / folder


def modules_of(test: str) -> set[str]:
    """The modules that the name of a test file names: the longest first words that are a module or a package."""
    words, room = Path(test).stem.removeprefix("test_").split("_"), room_of(test)
    for count in range(len(words), 0, -1):
        name = "_".join(words[:count])
        package = room if room.name == name else room / name
        found = [path for path in (room / f"{name}.py", package / "__init__.py") if (ROOT / path).exists()]
        if found or (ROOT / package).is_dir():
            return {str(path) for path in found} | {f"{package}/"}
    return set()


def module_tests() -> list[str]:
    files = sorted(str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if file not in WHOLE and Path(file).parts[0] not in WHOLE]


def has_code(path: Path) -> bool:
    """Whether there is more than a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def listed_modules() -> dict[str, str]:
    """Module -> test file, from COVERS."""
    listed = {}
    for test, names in COVERS.items():
        for name in names.split():
            listed[name[1:] + ".py" if name.startswith("/") else f"{room_of(test) / name}.py"] = test
    return listed


def test_every_test_file_is_named_after_a_module() -> None:
    strangers = [file for file in module_tests() if not modules_of(file)]
    assert not strangers, f"name these after their module, or list them in WHOLE: {strangers}"


def test_every_module_has_a_test_file() -> None:
    modules = [path for folder in ("bpo", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    named = set().union(*map(modules_of, module_tests()))
    missing = {str(path.relative_to(ROOT)) for path in modules if has_code(path)} - named
    assert missing - listed_modules().keys() == set(), "write a test file, or list them in COVERS"
    assert listed_modules().keys() - missing == set(), "not needed in COVERS: they have a test file, or are gone"


def test_the_tables_name_existing_test_files() -> None:
    listed = [*WHOLE, *COVERS, *SLOW_FILES]
    assert [name for name in listed if not (ROOT / "tests" / name).exists()] == []
