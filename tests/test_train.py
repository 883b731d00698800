"""Training end to end with DeepSpeed on two CPU ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_llava, tiny_qwen
from train_matrix import FROM_TWO, LOST, PLUGIN, RESUMED, STATEFUL

from bpo.cli import main
from bpo.losses.registry import LOSSES
from bpo.tools.refs import inspect_store

ROOT = Path(__file__).resolve().parent.parent
WORDS = "red blue green dog cat tree car one two three left right near under a the".split()
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def write_groups(root: Path, count: int = 16) -> None:
    rng = np.random.default_rng(0)
    (root / "images").mkdir()

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    with (root / "groups.jsonl").open("w") as file:
        for i in range(count):
            pixels = rng.integers(0, 255, (40 + 3 * i, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{i}.png")
            completions = [{"response": words(3 + i % 5), "score": 1, "type": "gt"}]
            completions.append({"response": words(4), "score": 0, "type": "mllm-hal"})
            if i % 2:
                completions.append({"response": words(5), "score": 0, "type": "llm-hal"})
            record = {"id": f"g{i}", "images": [f"{i}.png"], "prompt": words(i % 4 + 1), "completions": completions}
            file.write(json.dumps(record) + "\n")


def launch(
    command: list[str], timeout_s: int = 800, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher in a process group of its own, so that a hang leaves no workers behind."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**environment, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output)


def deepspeed(*arguments: str, ranks: int = 2, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    port = str(20000 + os.getpid() % 20000)
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port]
    return launch([*command, *arguments], cwd=cwd, **variables)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matrix")
    write_groups(root)
    tiny_llava(root / "llava")
    tiny_qwen(root / "qwen")
    result = launch([sys.executable, "tests/train_matrix.py", str(root)])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


def metrics(root: Path, case: str) -> list[dict]:
    return [json.loads(line) for line in (root / case / "metrics.jsonl").read_text().splitlines()]


def losses(root: Path, case: str) -> list[float]:
    return [m["loss"] for m in metrics(root, case)]


@pytest.mark.parametrize("mode", ["zero1", "zero3", "zero2_offload", "zero3_offload", "small_micro_batches"])
def test_every_zero_mode_and_packing_gives_the_same_losses(matrix: Path, mode: str) -> None:
    assert losses(matrix, mode) == pytest.approx(losses(matrix, "zero2"), abs=2e-4)
    second_epoch = [m["preference_loss"] for m in metrics(matrix, mode)[4:]]
    assert sum(second_epoch) / 4 < math.log(2) - 0.02  # and the loss has decreased


def test_losses_are_those_of_the_committed_file(matrix: Path) -> None:
    """Results must not change unintentionally: a new file is a decision, explained in its commit message."""
    lines = (ROOT / "tests" / "golden" / "tiny_llava_losses.txt").read_text().splitlines()
    golden = [float(line) for line in lines if not line.startswith("#")]
    assert losses(matrix, "zero2") == pytest.approx(golden, abs=1e-3)


def test_full_fine_tuning_is_the_same_under_zero_1_and_3(matrix: Path) -> None:
    assert losses(matrix, "full_zero3") == pytest.approx(losses(matrix, "full_zero1"), abs=5e-4)
    assert losses(matrix, "full_zero3")[1] != pytest.approx(losses(matrix, "zero3")[1], abs=1e-4)


@pytest.mark.parametrize("case", ["zero1", "zero3_offload", "full_zero3", "qwen", "dropout"])
def test_first_step_is_log_2(matrix: Path, case: str) -> None:
    assert metrics(matrix, case)[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_first_step_is_log_2_in_bfloat16_to_its_rounding(matrix: Path) -> None:
    assert metrics(matrix, "bfloat16")[0]["preference_loss"] == pytest.approx(math.log(2), abs=2e-2)


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_repeats_the_unbroken_one_bit_for_bit(matrix: Path, case: str) -> None:
    unbroken, resumed = metrics(matrix, case), metrics(matrix, f"resumed_{case}")
    assert [m["step"] for m in resumed] == list(range(1, 9))
    deterministic = [k for k in unbroken[0] if "second" not in k and k != "mfu"]
    assert [[m[k] for k in deterministic] for m in resumed] == [[m[k] for k in deterministic] for m in unbroken]


def test_every_rank_writes_a_share_of_the_reference(matrix: Path) -> None:
    summary = inspect_store(matrix / "zero2" / "reference")
    share = {str(one["name"])[:9]: one["num_entries"] for one in summary.shards}
    num_cells = 2 * 16 + 16 // 2  # of 16 groups, every second with a third answer
    assert share.keys() == {"rank00000", "rank00001"} and min(share.values()) >= 10
    assert summary.num_entries == num_cells and summary.num_duplicates == 0


def manifest(root: Path, case: str, step: int) -> dict:
    return json.loads((root / case / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


@pytest.mark.parametrize("case", STATEFUL)
def test_the_state_of_a_loss_is_in_the_checkpoint(matrix: Path, case: str) -> None:
    """That later steps depend on it is seen in the losses of the resumed run, compared above."""
    name = STATEFUL[case]
    middle, end = (manifest(matrix, case, step)["loss_states"] for step in (4, 8))
    assert middle.keys() == {name} and middle != end
    assert manifest(matrix, f"resumed_{case}", 8)["loss_states"] == end
    assert manifest(matrix, "zero2", 8)["loss_states"] == {}
    if case == "spa":
        assert len(end[name]["margins"]) == 8 and end[name]["num_steps"] == 8
    else:
        assert end[name]["count"] == 2 * 2 * 24 and end[name]["mean"] != 0  # epochs, rewards, pairs


def test_a_loss_without_a_reference_computes_and_stores_none(matrix: Path) -> None:
    for case in ("orpo", "resumed_orpo"):
        assert not (matrix / case / "reference").exists()
        assert {"loss/orpo", "loss/nll"} <= metrics(matrix, case)[0].keys()
    assert manifest(matrix, "orpo", 8)["base"]  # the base weights are compared nonetheless


def test_terms_are_logged_under_their_names(matrix: Path) -> None:
    weights = {
        "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
        "rpo": {"rpo_diagonal": 1.0, "image": 0.5, "second": 0.5},
    }
    for case, of_case in weights.items():
        for step in metrics(matrix, case):
            total = sum(weight * step[f"loss/{name}"] for name, weight in of_case.items())
            assert step["loss"] == pytest.approx(total, rel=1e-6)


CHANGES = [(case, f"{case}_by_{ranks}") for ranks, cases in FROM_TWO.items() for case in cases]
CHANGES += [("alone", "alone_by_4"), ("zero2", "zero2_by_zero3"), ("full_zero3", "full_zero3_by_hpz")]


@pytest.mark.parametrize(("case", "continued"), CHANGES)
def test_another_number_of_ranks_makes_the_same_steps(matrix: Path, case: str, continued: str) -> None:
    """The state is exact; the order of sums differs, so losses agree up to rounding (docs/checkpoints.md)."""
    unbroken, other = metrics(matrix, case), metrics(matrix, continued)
    assert [m["step"] for m in other] == list(range(1, 9))
    tolerance = 5e-3 if case == "bfloat16" else 1e-5
    assert losses(matrix, continued) == pytest.approx(losses(matrix, case), abs=tolerance)
    # Ensures that this is the continued run, not two identical runs from the start.
    assert unbroken[3]["loss"] == other[3]["loss"]
    before, after = manifest(matrix, case, 8), manifest(matrix, continued, 8)
    assert before["fingerprints"] == after["fingerprints"]  # of the plan: the same groups in the same steps


def test_metrics_have_the_standard_names(matrix: Path) -> None:
    names = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected"
    names += " loss lr grad_norm tokens_per_second pairs_per_second"
    for step in metrics(matrix, "zero3"):
        assert set(names.split()) <= step.keys()
        assert step["rewards/margins"] == pytest.approx(step["rewards/chosen"] - step["rewards/rejected"], abs=1e-6)


def test_non_finite_loss_stops_all_ranks_and_names_records(matrix: Path) -> None:
    messages = [json.loads((matrix / f"diverges.{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "not finite" in messages[0] and "g" in messages[0].split("groups: ")[1]


def test_a_damaged_weight_of_the_base_model_is_named_instead_of_the_records(matrix: Path) -> None:
    messages = [json.loads((matrix / f"damaged_weight.{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "weights are not finite: model.language_model.layers.1.mlp.up_proj.weight; " in messages[0]


def test_ranks_that_differ_stop_together_and_name_the_option(matrix: Path) -> None:
    messages = [json.loads((matrix / f"ranks_differ.{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "option train.lr: 0.005 on rank 0" in messages[0] and "0.01 on rank 1" in messages[0]
    assert not (matrix / "ranks_differ" / "reference").exists()  # before anything long


def test_images_lost_between_steps_cost_their_groups_and_not_the_run(matrix: Path) -> None:
    """Deleted, truncated and replaced under ZeRO-3 on two ranks; a later start leaves the same groups out."""
    lost = [json.loads(line) for line in (matrix / "lost" / "lost.jsonl").read_text().splitlines()]
    assert {f"{entry['group_id'][1:]}.png" for entry in lost} == {name for names in LOST.values() for name in names}
    assert len(lost) == len({entry["group_id"] for entry in lost})
    details = {entry["group_id"]: entry["detail"] for entry in lost}
    assert "missing" in details["g3"] and "cannot be decoded" in details["g8"] and "has changed" in details["g12"]
    for case in ("lost", "resumed_lost"):
        assert [m["step"] for m in metrics(matrix, case)] == list(range(1, 9))
        assert all(math.isfinite(m["loss"]) for m in metrics(matrix, case))
    assert losses(matrix, "lost")[0] == losses(matrix, "zero3")[0]  # before the change
    assert losses(matrix, "lost")[4:] != losses(matrix, "zero3")[4:]
    before, after = manifest(matrix, "lost", 8), manifest(matrix, "resumed_lost", 8)
    assert before["fingerprints"] == after["fingerprints"]


def test_a_plugin_that_differs_between_nodes_stops_all_ranks(matrix: Path) -> None:
    messages = [json.loads((matrix / f"plugins_differ.{rank}.json").read_text()) for rank in range(4)]
    assert len(set(messages)) == 1
    (line,) = (line for line in messages[0].splitlines() if line.startswith("  "))
    assert "content of loss.plugin" in line and line.count("rank ") == 4


def test_a_changed_plugin_is_refused_by_name_and_continued_if_accepted(matrix: Path) -> None:
    message = json.loads((matrix / "plugin_changed.json").read_text())
    assert "  plugin: " in message and "accept_changes '[\"plugin\"]'" in message
    before, after = losses(matrix, "plugin"), losses(matrix, "plugin_changed")
    assert after[:4] == before[:4] and min(after[4:]) > max(before) + 1  # of (2 - x)^2 instead of (1 - x)^2


def test_run_records_config_versions_and_commit(matrix: Path) -> None:
    assert "lr: 0.005" in (matrix / "zero3" / "config.yaml").read_text()
    assert "deepspeed: " in (matrix / "zero3" / "versions.txt").read_text()


def test_one_rank_equals_two_from_the_command_line(matrix: Path) -> None:
    """`deepspeed bpo/train.py` as a user starts it; the content of a step does not depend on the number of ranks.

    Its loss is a plug-in in the working directory.
    """
    config = (matrix / "plugin" / "config.yaml").read_text().replace(str(matrix / "plugin"), str(matrix / "one_rank"))
    (matrix / "one_rank.yaml").write_text(config)
    script, options = str(ROOT / "bpo" / "train.py"), ["--config", "../one_rank.yaml", "--train.tensorboard", "true"]
    result = deepspeed(script, *options, ranks=1, cwd=matrix / "node0")
    assert result.returncode == 0, result.stdout[-6000:]
    assert losses(matrix, "one_rank") == pytest.approx(losses(matrix, "plugin"), abs=2e-4)
    assert list((matrix / "one_rank" / "tensorboard").glob("events*"))


def test_an_unknown_loss_ends_before_anything_is_compiled(matrix: Path, tmp_path: Path) -> None:
    """Under the launcher, on all ranks, without a directory of the run."""
    options = ["--config", str(matrix / "one_rank.yaml"), "--loss.type", "sigmiod", "--loss.plugin", ""]
    options += ["--train.output_dir", str(tmp_path / "run")]
    result = deepspeed("bpo/train.py", *options, TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    assert result.returncode == 1 and "Traceback" not in result.stdout.split("launch.py")[0]
    assert result.stdout.count("error: loss.type is 'sigmiod'; did you mean 'sigmoid'?") == 2, result.stdout[-3000:]
    assert not (tmp_path / "run").exists() and not (tmp_path / "compiled").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--loss.type nonsense", "loss.type is 'nonsense'; available: "),
        ("--loss.type hinge --loss.label_smoothing 0.1", "label_smoothing=0.1 does not apply to hinge"),
        ("--loss.plugin missing.py", "loss.plugin missing.py: no such file"),
        # Found in the working directory and run, for its loss is suggested.
        ("--loss.plugin my_loss.py --loss.type square_hinge", "did you mean 'squared_hinge'?"),
    ],
)
def test_bpo_train_refuses_a_loss_before_deepspeed_starts(
    options: str, message: str, tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpo.engine.init_distributed", lambda *_: pytest.fail("DeepSpeed was started"))
    monkeypatch.setitem(LOSSES, "squared_hinge", LOSSES["hinge"])  # so that the plug-in's is removed after the test
    monkeypatch.delitem(LOSSES, "squared_hinge")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_loss.py").write_text(PLUGIN)
    (tmp_path / "groups.jsonl").touch()
    inputs = ["--model.path", str(tiny_llava_dir), "--data.groups", "groups.jsonl", "--train.output_dir", "run"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *inputs, *options.split()])
    assert str(ended.value.code).startswith("error: loss") and message in str(ended.value.code)
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_same_directory_is_refused(matrix: Path) -> None:
    messages = [json.loads((matrix / f"again.{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1] and "pass --resume" in messages[0]


def test_a_signal_saves_a_checkpoint_and_resume_finishes(matrix: Path) -> None:
    """Ctrl-C as `deepspeed` passes it on: SIGINT to all processes, then SIGTERM, also to those that load the data."""
    config = (matrix / "zero2" / "config.yaml").read_text().replace(str(matrix / "zero2"), str(matrix / "signalled"))
    config = config.replace("epochs: 2", "epochs: 40").replace("num_workers: 0", "num_workers: 2")
    (matrix / "signalled.yaml").write_text(config)
    command = [sys.executable, "-m", "bpo.train", "--config", str(matrix / "signalled.yaml")]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        command,
        cwd=matrix,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # may be ignored in background
    )
    try:
        written = matrix / "signalled" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (written.exists() and written.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75, errors[-3000:]
    assert "Traceback" not in errors and errors.count("SIGINT: stopping") == 1
    done = len(metrics(matrix, "signalled"))
    assert (matrix / "signalled" / "checkpoints" / "latest").read_text() == f"step-{done:08d}"
    more = ["--resume", "--train.max_steps", str(done + 2)]
    refused = launch([*command, *more])  # a shorter run has another learning rate in every step
    assert refused.returncode == 1 and "train.max_steps: 0 ->" in refused.stdout, refused.stdout[-3000:]
    more += ["--train.accept_changes", '["train.max_steps"]']
    again = launch([*command, *more])
    assert again.returncode == 0, again.stdout[-3000:]
    assert [m["step"] for m in metrics(matrix, "signalled")] == list(range(1, done + 3))
