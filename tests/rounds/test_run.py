"""Rounds go on where they were, do nothing twice, and say what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.job.exits import EXIT_INTERRUPTED, Interrupted
from bpo.job.lock import RunLock, RunLockError
from bpo.rounds.plan import plan_rounds
from bpo.rounds.run import HISTORY, StageFailed, run_rounds
from tests.rounds.jobs import MadeUp, rounds_config

STAGES = [(number, name) for number in (1, 2) for name in ("generate", "judge", "select", "train", "export")]


class Killed(BaseException):
    """In place of a signal that ends the process."""


def test_killed_in_any_stage_it_goes_on_there_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpo.rounds.run._check_options", lambda stage: None)  # takes most of the time
    config = rounds_config(tmp_path, [{}, {}], rank={"judge": "chair"})
    for number, stage in enumerate(STAGES):
        killed = MadeUp(stage, Killed())
        with pytest.raises(Killed):
            run_rounds(config, run=killed)
        assert killed.ran == STAGES[max(0, number - 1) : number + 1]
    last = MadeUp()
    run_rounds(config, run=last)
    assert last.ran == STAGES[-1:]
    again = MadeUp()
    run_rounds(config, run=again)
    assert again.ran == []


def test_a_failure_shows_the_end_of_the_log_and_keeps_the_code(tmp_path: Path) -> None:
    config = rounds_config(tmp_path, [{}])
    with pytest.raises(StageFailed, match=r"round 1, train failed with code 74; .*log ends with:\nlog of") as found:
        run_rounds(config, run=MadeUp((1, "train"), code=74))
    assert found.value.exit_code == 74
    with pytest.raises(Interrupted, match="round 1, train was stopped by a signal; run the same command to go on"):
        run_rounds(config, run=MadeUp((1, "train"), code=EXIT_INTERRUPTED))
    with pytest.raises(StageFailed, match="it ended without .*run"):
        run_rounds(config, run=MadeUp((1, "train"), code=0))
    history = [json.loads(line) for line in (tmp_path / "runs" / HISTORY).read_text().splitlines()]
    assert [(entry["stage"], entry["code"]) for entry in history][-3:] == [("train", 74), ("train", 75), ("train", 0)]


def test_a_value_out_of_range_in_the_last_round_is_refused_before_the_first(tmp_path: Path) -> None:
    config = rounds_config(tmp_path, [{}, {"options": {"train": {"lr": -1.0}}}])
    runner = MadeUp()
    with pytest.raises(ValueError, match=r"rounds.each\[1\].options: .*train.lr"):
        run_rounds(config, run=runner)
    assert runner.ran == []


def test_options_of_a_finished_stage_must_not_change(tmp_path: Path) -> None:
    run_rounds(rounds_config(tmp_path, [{}]), run=MadeUp())
    changed = rounds_config(tmp_path, [{}], bootstrap={"weaken": {"noise_step": 500}})
    with pytest.raises(ValueError, match="generate is finished, with other options: .*noise_step was 900, is 500"):
        run_rounds(changed, run=MadeUp())
    more = MadeUp()
    run_rounds(rounds_config(tmp_path, [{}, {}]), run=more)
    assert {number for number, _ in more.ran} == {2}


def test_one_process_runs_the_rounds_of_a_folder(tmp_path: Path) -> None:
    config = rounds_config(tmp_path, [{}])
    lock = RunLock(tmp_path / "runs")
    try:
        with pytest.raises(RunLockError):
            run_rounds(config, run=MadeUp())
    finally:
        lock.release()


def test_a_stage_is_unfinished_until_its_last_file_is_there(tmp_path: Path) -> None:
    config = rounds_config(tmp_path, [{}], rank={"judge": "chair"})
    stages = {stage.name: stage for stage in plan_rounds(config)}
    run_rounds(config, run=MadeUp())
    assert all(stage.is_finished() for stage in stages.values())
    (stages["judge"].result / "summary.json").unlink()
    (stages["export"].result / "bpo_export.json").unlink()
    manifest = stages["train"].result / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"steps_done": 4', '"steps_done": 3'))
    assert [name for name, stage in stages.items() if not stage.is_finished()] == ["judge", "train", "export"]
