"""Whole online runs: whose weights generate and are the reference, what a kill changes, ZeRO stages, lost images."""

from __future__ import annotations

import json
import operator
import shutil
import sys
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bpo.checkpoint.files import verify_checkpoint
from bpo.checkpoint.shards import ShardSet
from bpo.cli import main
from bpo.formats.files import read_groups
from bpo.job.exits import write_status
from bpo.model.reference.format import read_fingerprint
from bpo.tools.refs import read_store
from tests.test_train import launch
from tests.training.online.online_job import NUM_HELD_OUT, NUM_RECORDS, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("online")
    write_inputs(root)
    result = launch([sys.executable, "-m", "tests.training.online.online_job", str(root)])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    """The steps without times, and without what a continued run reads instead of computing it."""
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k != "online/reference_tokens"} for line in lines]


def losses(root: Path, name: str) -> list[float]:
    return [line["loss"] for line in metrics(root, name) if "loss" in line]


def windows(root: Path, name: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / name / "online").glob("window-*")}


def state(root: Path, name: str) -> dict[str, Any]:
    """Everything in the last checkpoint: each rank's tensors, and the state of the run."""
    directory = root / name / "checkpoints" / "step-00000006"
    manifest = verify_checkpoint(directory)
    with safe_open(str(directory / "rank-00000.safetensors"), framework="pt") as tensors:
        values = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 not a dict
    stored = json.loads(ShardSet(directory, list(manifest["files"])).state)
    stored["costs"] = {k: v for k, v in stored["costs"].items() if k in ("negatives", "refused")}
    return {**values, "state": stored}


def calls(root: Path, name: str) -> list[tuple[str, torch.Tensor]]:
    return torch.load(root / name / "calls.pt")


@pytest.mark.parametrize(("name", "every"), [("every1", 1), ("every2", 2)])
def test_the_average_generates_and_a_copy_of_it_is_the_reference(runs: Path, name: str, every: int) -> None:
    """b = 0.5; the reference moves after steps 2 and 4. At step 0 all three are the policy."""
    average, reference, step = calls(runs, name)[0][1], calls(runs, name)[0][1], 0
    generated, scored = [], []
    for what, weights in calls(runs, name):
        if what == "policy":
            step += 1
            average = 0.5 * average + 0.5 * weights
            reference = average if step % 2 == 0 else reference
            assert not torch.allclose(weights, average, rtol=0, atol=1e-4)
        elif what == "generate":
            torch.testing.assert_close(weights, average, rtol=0, atol=1e-7)
            generated.append(step)
        else:
            torch.testing.assert_close(weights, reference, rtol=0, atol=1e-7)
            scored.append(step)
    assert set(generated) == set(range(0, 6, every))
    assert {0, 2, 4} <= set(scored) <= set(range(6))
    assert metrics(runs, name)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(
    ("unbroken", "continued"), [("every1", "every1-killed"), ("every2", "every2-killed"), ("every1", "stopped")]
)
def test_a_continued_run_repeats_the_unbroken_one_bit_for_bit(runs: Path, unbroken: str, continued: str) -> None:
    """A kill two steps after a checkpoint; with windows of two steps the checkpoint is in the middle of one. A signal
    while negatives are generated leaves a checkpoint of the step before.
    """
    assert metrics(runs, continued) == metrics(runs, unbroken)
    assert [line["step"] for line in metrics(runs, continued)] == list(range(1, 7))
    assert windows(runs, continued) == windows(runs, unbroken)
    before, after = state(runs, unbroken), state(runs, continued)
    assert before.pop("state") == after.pop("state")
    assert {"master.0", "exp_avg.0", "average.0", "reference.0"} <= before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    stopped = (runs / continued / "checkpoints" / "step-00000004").exists()
    assert stopped == (continued == "stopped")


def test_no_window_that_a_checkpoint_contains_is_made_again(runs: Path) -> None:
    made = {name: [what for what, _ in calls(runs, name)] for name in ("every2", "every2-killed")}
    assert made["every2"].count("generate") == 3 * made["every2-killed"].count("generate") > 0
    assert made["every2-killed"][0] == "policy"  # step 4, from the state


def test_zero_3_makes_the_same_negatives_and_losses(runs: Path) -> None:
    assert windows(runs, "zero3") == windows(runs, "every1")
    assert losses(runs, "zero3") == pytest.approx(losses(runs, "every1"), abs=2e-5)


def test_each_step_draws_from_what_the_average_made_of_its_prompts(runs: Path) -> None:
    for name, every in (("every1", 1), ("every2", 2)):
        files = sorted(path for path in (runs / name / "online").glob("window-*") if "refused" not in path.name)
        assert [path.name for path in files] == [f"window-{step:08d}.jsonl" for step in range(1, 7, every)]
        groups = [group for path in files for group in read_groups(path)]
        made = [tuple(group.id.split("@")) for group in groups]
        assert [int(step) for _, step in made] == [step for step in range(1, 7) for _ in range(2)]
        assert {record for record, _ in made[:NUM_RECORDS]} == {f"r{k}" for k in range(NUM_RECORDS)}  # an epoch
        starts: dict[str, list[int]] = {}
        for group in groups:
            preferred, negative = group.completions
            assert (preferred.type, negative.type) == ("gt", "mllm-segment")
            assert len(negative.response) <= len(preferred.response) and negative.response != preferred.response
            start = len(commonprefix([preferred.response, negative.response]))
            starts.setdefault(group.id.split("@")[0], []).append(start)
        assert sum(len(set(of_record)) == 2 for of_record in starts.values()) >= 2  # another segment in another step
        last = metrics(runs, name)[-1]
        assert last["online/buffer"] == len(groups) == 12
        assert [line["online/negatives"] for line in metrics(runs, name)] == ([2] * 6 if every == 1 else [4, 0] * 3)


def test_log_probs_of_each_reference_have_a_store_of_their_own(runs: Path) -> None:
    for name, kept in (("every1", [2, 4]), ("every1-killed", [2, 4]), ("lost", [4])):  # `lost` has one checkpoint
        stores = sorted(path.name for path in (runs / name / "online").glob("reference-*"))
        assert stores == [f"reference-{step:08d}" for step in kept]
    online = runs / "every1" / "online"
    initial = read_fingerprint(runs / "every1" / "reference")
    moved = read_fingerprint(online / "reference-00000004")
    assert "online" not in initial and moved == {**initial, "online": "weights after step 4"}


def test_a_loss_without_a_reference_computes_none(runs: Path) -> None:
    """Under ZeRO-2."""
    assert len(losses(runs, "orpo")) == 2 and not list((runs / "orpo").glob("**/reference*"))
    assert "reference" not in {what for what, _ in calls(runs, "orpo")}


def test_held_out_groups_are_those_of_a_file_and_their_records_no_prompts(runs: Path) -> None:
    evaluated = [line for line in metrics(runs, "held_out") if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [0, 2]
    assert evaluated[0]["eval/preference_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert metrics(runs, "held_out")[1]["epoch"] == pytest.approx(2 / (NUM_RECORDS - NUM_HELD_OUT), abs=1e-4)


def test_a_lost_image_costs_its_annotations_and_not_the_run(runs: Path) -> None:
    lost = [json.loads(line) for line in (runs / "lost" / "online" / "lost.jsonl").read_text().splitlines()]
    assert {line["group_id"].split("@")[0] for line in lost} <= {"r0", "r3", "r6"} and lost  # of wide.png
    assert all("wide.png" in line["detail"] for line in lost)
    assert len(metrics(runs, "lost")) == 6 and len(lost) == len({line["group_id"].split("@")[0] for line in lost})
    stored = state(runs, "lost")["state"]["buffer"]
    gone = {int(line["group_id"][1]) for line in lost}
    assert stored and not gone & {negative["record"] for negative, _ in stored}
    later = [
        group for number in (3, 5) for group in read_groups(runs / "lost" / "online" / f"window-{number:08d}.jsonl")
    ]
    assert later and not any(group.images == ("wide.png",) for group in later)


def tokens(root: Path, name: str) -> list[int]:
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [line["online/reference_tokens"] for line in lines if "loss" in line]


def test_a_run_computes_only_what_its_follower_has_not(runs: Path) -> None:
    """The follower is up to date before steps 2, 4 and 6, but for the negatives that are made for them."""
    alone, followed = tokens(runs, "every1"), tokens(runs, "followed")
    assert followed[::2] == alone[::2] and all(map(operator.le, followed, alone))
    assert sum(followed[1::2]) < sum(alone[1::2])
    assert losses(runs, "followed") == pytest.approx(losses(runs, "every1"), abs=1e-5)
    weights = [path.parent.name for path in (runs / "followed" / "online").glob("*/weights")]
    assert weights == ["reference-00000006"]  # those of earlier references take no space


def entries(store: Path, label: str) -> dict[bytes, torch.Tensor]:
    found = {}
    for shard in read_store(store)[1]:
        values = torch.from_numpy(shard.map_values().copy())
        for record in shard.records_E if shard.index.name.startswith(label) else ():
            found[record["key"].tobytes()] = values[int(record["offset"]) :][: int(record["count"])]
    return found


def test_a_follower_computes_what_the_run_does(runs: Path) -> None:
    gaps, names = [], ("reference", "online/reference-00000002", "online/reference-00000004")
    followers = [entries(runs / "followed" / name, "refs-follow") for name in names]
    for name, of_follower in zip(names, followers, strict=True):
        of_run = entries(runs / "every1" / name, "rank")
        gaps += [float((of_follower[k] - of_run[k]).abs().max()) for k in of_follower.keys() & of_run.keys()]
    assert len(gaps) >= 4 and max(gaps) <= 1e-5
    both = followers[1].keys() & followers[2].keys()
    assert both and all((followers[1][k] - followers[2][k]).abs().max() > 1e-3 for k in both)  # another reference
    last = runs / "followed" / "online" / "reference-00000006"
    assert len(entries(last, "refs-follow")) > 12  # the answers of the whole buffer


def test_follow_waits_ends_with_the_run_and_refuses_a_store_of_another_setting(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "followed", run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("dtype: float32", "dtype: bfloat16"))
    assert main(["refs", "follow", str(run), "--device", "cpu"]) == 1
    assert "dtype: float32 in the store, bfloat16 in this run" in capsys.readouterr().err
    (run / "online" / "reference.json").unlink()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            write_status(run, 0, "finished")

    monkeypatch.setattr("bpo.tools.refs_follow.time.sleep", nap)
    caplog.set_level("INFO")
    assert main(["refs", "follow", str(run), "--device", "cpu"]) == 0
    assert len(naps) == 2 and caplog.text.count("waiting for a reference") == 1
