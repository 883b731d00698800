"""Evaluations while training: whole runs on one and two ranks, and what is kept, repeated and stopped."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_worker import Run

from bpo.checkpoint.export import run_export
from bpo.checkpoint.files import best_step, checkpoint_dirs
from bpo.config.training import Config, ExportConfig, TrainConfig
from bpo.evaluation.run import run_evaluation
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_groups
from bpo.job.exits import Interrupted
from bpo.tools.score import score_groups
from bpo.training import evaluation
from bpo.training.evaluation import Evaluations
from bpo.training.evaluation_plan import EvaluationPlan
from bpo.training.held_out import _place
from tests.test_train import launch, write_groups
from tests.tiny import tiny_llava
from tests.training.evaluation_job import BLIND, NUM_IMAGES, evaluated, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluations")
    write_groups(root)
    tiny_llava(root / "llava")
    write_inputs(root)
    result = launch([sys.executable, "-m", "tests.training.evaluation_job", str(root)])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    read = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in read]


def answers(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "answers.jsonl").read_text().splitlines()]


def test_the_base_the_due_steps_and_the_last_are_evaluated(runs: Path) -> None:
    for name in ("evaluated", "alone"):
        order = [(line["step"], "eval/loss" in line) for line in lines(runs, name)]
        assert order == [(0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]
        base = lines(runs, name)[0]
        assert base["eval/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert base["eval/rewards/margins"] == 0 and base["eval/pope/yes_ratio"] >= 0


def test_evaluations_change_no_loss(runs: Path) -> None:
    assert [line for line in lines(runs, "evaluated") if "loss" in line] == lines(runs, "plain")


def test_a_killed_and_continued_run_is_an_unbroken_one_and_repeats_no_evaluation(runs: Path) -> None:
    assert lines(runs, "resumed") == lines(runs, "evaluated")
    before = answers(runs, "evaluated")
    assert len(before) == 3 * 3
    assert answers(runs, "resumed") == before + before[-3:]  # those of step 3 only
    assert best_step(runs / "resumed") == best_step(runs / "evaluated")


def test_ranks_and_partitions_share_one_set_of_answers(runs: Path) -> None:
    """Of the base: dropout masks of later steps differ between numbers of ranks."""
    base = answers(runs, "evaluated")[:3]
    assert base == answers(runs, "alone")[:3]
    assert [len(one["answers"]) for one in base] == [NUM_IMAGES, 2, 3]
    assert len({answer for one in base for answer in one["answers"]}) > 4
    same = {key: value for key, value in lines(runs, "alone")[0].items() if "loss" not in key}
    assert lines(runs, "evaluated")[0] == pytest.approx({**lines(runs, "evaluated")[0], **same}, abs=1e-5)


def test_metrics_are_those_of_the_exported_model(runs: Path, tmp_path: Path) -> None:
    config, last = evaluated(runs, "alone", stage=1), lines(runs, "alone")[-1]
    run_export(replace(config, export=ExportConfig(checkpoint=str(runs / "alone"), output=str(tmp_path / "model"))))
    exported = replace(config, model=replace(config.model, path=str(tmp_path / "model")))
    options = replace(config.evaluation, output=str(tmp_path / "results.json"))
    with BLIND:
        metrics = run_evaluation(replace(exported, evaluation=options), progress=False)["metrics"]
    assert len(metrics) > 20
    assert {f"eval/{name}": value for name, value in metrics.items()} == {
        key: value for key, value in last.items() if key.startswith(("eval/chair", "eval/pope", "eval/blind"))
    }
    expected = held_out_rewards(config, exported)
    assert {name: last[f"eval/rewards/{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)


def held_out_rewards(base: Config, trained: Config) -> dict[str, float]:
    """Rewards by the log-probs of the base and the merged model, of the four groups whose hash is lowest."""
    groups = read_groups(Path(base.data.groups))
    held = sorted(groups, key=lambda group: _place(group.id))[:4]

    def logps(config: Config) -> list[list[float]]:
        return [[sum(of) for of in scored] for _, _, scored in score_groups(config, held, 300, BadRecords())]

    before, after = logps(base), logps(trained)
    rewards = [base.loss.beta * (torch.tensor(a) - torch.tensor(b)) for a, b in zip(after, before, strict=True)]
    margins = torch.cat([of_group[0] - of_group[1:] for of_group in rewards])
    return {"margins": float(margins.mean()), "accuracies": float((margins > 0).float().mean())}


class Report:
    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.written.append((step, metrics))


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes evaluations of a run with 9 steps, every 2 of them, whose `eval/loss` comes from a list."""
    monkeypatch.setattr(evaluation, "from_rank_0", lambda make: json.loads(json.dumps(make())))

    def make(script: list[Any], *, lower: bool = True, done: int = 0, **options: Any) -> Evaluations:
        def measure(self: Evaluations) -> dict[str, float]:
            value = script.pop(0)
            if value is Interrupted:
                raise Interrupted("stopped by a signal")
            return {"loss": value}

        monkeypatch.setattr(Evaluations, "_measure", measure)
        train = TrainConfig(output_dir=str(tmp_path), evaluate_every_steps=2, keep_best="eval/loss", **options)
        trainer: Any = SimpleNamespace(device=torch.device("cpu"))
        guard: Any = SimpleNamespace(watchdog=SimpleNamespace(beat=lambda doing: None))
        plan = EvaluationPlan(lower_is_better=lower)
        return Evaluations(Config(train=train), plan, trainer, None, None, guard, None, done=done, total=9)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(("lower", "kept"), [(True, [6, 9]), (False, [2, 9])])
def test_the_best_checkpoint_is_kept(scripted: Any, tmp_path: Path, lower: bool, kept: list[int]) -> None:
    """The base is the best by far, but has no checkpoint; a value that is not a number is never the best."""
    evaluations, report = scripted([0.1 if lower else 9.0, 0.9, 0.7, 0.5, math.nan, 0.5], lower=lower), Report()
    run = Run(tmp_path, keep_last=1)
    assert not evaluations.at(0, report, run.saver.best)
    for step in range(1, 10):
        best = evaluations.at(step, report, run.saver.best)
        run.to(step, due=step == 9, best=best)
    run.saver.finish(9)
    assert [step for step, _ in report.written] == [0, 2, 4, 6, 8, 9]
    assert sorted(int(d.name[5:]) for d in checkpoint_dirs(tmp_path)) == kept
    assert best_step(tmp_path) == kept[0]


def test_a_resumed_run_repeats_no_finished_evaluation_and_does_one_that_was_cut_short(
    scripted: Any, tmp_path: Path
) -> None:
    written = [{"step": 4, "loss": 1.0}, {"step": 4, "eval/loss": 0.5}, {"step": 6, "eval/loss": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    report = Report()
    finished = scripted([], done=4, resume=True)
    # A kill came before the checkpoint was named: it is better than the one before.
    assert finished.at(4, report, None) and not finished.at(4, report, 4) and not report.written
    (tmp_path / "metrics.jsonl").write_text(json.dumps(written[1]) + "\n")
    cut_short = scripted([0.4], done=6, resume=True)
    assert cut_short.at(6, report, 4) and [step for step, _ in report.written] == [6]
    other_run = scripted([0.9], done=0)  # another run in this directory
    other_run.at(4, report, None)
    assert [step for step, _ in report.written] == [6, 4]


def test_a_signal_leaves_the_evaluation_to_the_next_start(scripted: Any) -> None:
    report = Report()
    evaluations = scripted([Interrupted])
    assert not evaluations.at(2, report, None) and evaluations.stopped and not report.written
    with pytest.raises(Interrupted):
        scripted([Interrupted]).at(0, report, None)  # no checkpoint could be written


def test_the_random_state_is_that_before_the_evaluation(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = scripted([])
    monkeypatch.setattr(Evaluations, "_measure", lambda self: {"loss": float(torch.rand(()))})
    torch.manual_seed(7)
    evaluations.at(2, Report(), None)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
