"""Shared by all tests: an environment without network, one thread per process, and skips with reasons."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Before torch, transformers or deepspeed are imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The everyday tests are the same on each run; found counterexamples are kept as `@example`. `make fuzz` draws others,
# FUZZ times as many, and prints how to reproduce a failure.
FUZZ = int(os.environ.get("FUZZ", "1"))
hypothesis.settings.register_profile("everyday", derandomize=True, database=None)
hypothesis.settings.register_profile(
    "fuzz", derandomize=False, database=None, print_blob=True, max_examples=100 * FUZZ, deadline=None
)
hypothesis.settings.load_profile("fuzz" if FUZZ > 1 else "everyday")

ROOT = Path(__file__).resolve().parent.parent
# Files of 20 s or more, the slowest first: none should start when the other workers are about to finish.
SLOW_FILES = """
    recipes/test_rounds.py test_train.py cluster/test_cluster.py cluster/test_rounds.py test_end_to_end.py
    kernels/test_triton_interpreter.py model/levers/test_compiled.py model/levers/test_compiled_zero.py
    training/test_quantization_gap.py model/levers/test_lora_zero.py model/levers/test_lora_runs.py
    model/levers/test_layer_kernels_zero.py tools/bench/test_levers.py training/test_step_synchronisation.py
    kernels/bench/test_aot.py job/test_watchdog_rank_loss.py tools/demo/test_run.py test_engine_gradients.py
    tools/bench/test_step.py bootstrap/test_run.py model/attention/test_flex.py tools/plan/test_memory.py
    tools/plan/test_command.py benchmarks/test_gpu_set.py tools/plan/test_activations.py
    bootstrap/engines/test_text.py model/attention/test_shared_prefix.py model/attention/test_flops.py
    bootstrap/job/test_spool.py model/test_trainable.py job/test_compile_locks.py cluster/test_srun.py
    formats/test_reading_fuzz.py test_view_cost.py recipes/test_methods.py benchmarks/test_methods.py test_loss_types.py
    test_term_gradients.py training/test_embeddings.py training/test_evaluation.py
    training/online/test_steps.py rounds/test_run_kill.py training/test_features.py training/test_extrapolation.py
""".split()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA on disk, one per session; read-only."""
    from tests.tiny import tiny_llava

    return tiny_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="session")
def tiny_qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-VL on disk, one per session; read-only."""
    from tests.tiny import tiny_qwen

    return tiny_qwen(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="session")
def family_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_llava_dir: Path, tiny_qwen_dir: Path
) -> Callable[[str], Path]:
    """The directory of a tiny random model by model type, created on first use."""
    made = {"llava": tiny_llava_dir, "qwen2_5_vl": tiny_qwen_dir}

    def directory(model_type: str) -> Path:
        if model_type not in made:
            from tests.tiny_families import BUILDERS

            made[model_type] = BUILDERS[model_type](tmp_path_factory.mktemp("models") / model_type)
        return made[model_type]

    return directory


@pytest.fixture(scope="session")
def photo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three small pictures of different shapes: wide.png, tall.png, square.png."""
    from tests.sample_groups import write_photos

    return write_photos(tmp_path_factory.mktemp("photos"))


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU"


def _why_no_slurm() -> str | None:
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    return f"needs Slurm; not on PATH: {', '.join(missing)}" if missing else None


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the order of files under xdist, which would start those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow files first; skips tests marked `gpu` or `cluster` if the machine lacks their requirements."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for marker, why_not in (("gpu", _why_no_gpu), ("cluster", _why_no_slurm)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why_not() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
