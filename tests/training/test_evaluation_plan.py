"""What an evaluation during training consists of, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpo.config.training import Config, DataConfig, EvaluationConfig, LossConfig, TrainConfig
from bpo.losses.program import LossProgram
from bpo.training.evaluation_plan import EvaluationPlan, plan_evaluation
from tests.sample_groups import PHOTOS

Plan = Callable[..., EvaluationPlan | None]


@pytest.fixture
def plan(photo_root: Path, tmp_path: Path) -> Plan:
    """Plans with options of `train`, `evaluation` and the loss; writes CHAIR and POPE files for three pictures."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(PHOTOS)]
    objects = [{"image_id": i, "category_id": i % 2} for i in range(len(PHOTOS))]
    categories = [{"id": 0, "name": "dog"}, {"id": 1, "name": "car"}]
    instances = {"images": images, "annotations": objects, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    asked = [{"image": name, "text": "Is there a dog?", "label": "yes"} for name in PHOTOS]
    lines = [json.dumps({"question_id": i, **question}) for i, question in enumerate(asked)]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(lines))

    def make(loss: LossConfig | None = None, evaluation: dict[str, Any] | None = None, **train: Any) -> Any:
        named = {"chair_instances": str(tmp_path / "instances.json")} if evaluation is None else evaluation
        train = {"evaluate_every_steps": 10, **train}
        config = Config(
            data=DataConfig(image_root=str(photo_root)),
            evaluation=EvaluationConfig(**named),
            train=TrainConfig(**train),
        )
        return plan_evaluation(config, LossProgram(loss or LossConfig()))

    return make


def test_instances_give_chair_and_a_guard_of_the_form_of_answers_about_the_same_images(plan: Plan) -> None:
    found = plan(evaluation_images=2)
    assert found is not None
    chair, guard = found.benchmarks
    assert (chair.name, guard.name) == ("chair", "format_guard")
    assert len(chair.images) == 2 and set(guard.images) == set(chair.images)
    assert {question.labels for question in guard.questions} >= {("Yes", "No")}


def test_a_suite_is_taken_as_it_is(plan: Plan, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"benchmarks: [{{type: pope, questions: [{tmp_path / 'coco_pope_random.json'}]}}]")
    found = plan(evaluation={"suite": str(suite)}, evaluation_images=0)
    assert found is not None
    assert [benchmark.name for benchmark in found.benchmarks] == ["pope"] and len(found.benchmarks[0].questions) == 3


def test_off_by_default_and_held_out_groups_alone_are_enough(plan: Plan) -> None:
    assert plan(evaluate_every_steps=0) is None
    assert plan(evaluation={}, held_out_groups=0.1) == EvaluationPlan()
    with pytest.raises(ValueError, match="nothing to evaluate: set train.held_out_groups, evaluation.suite"):
        plan(evaluation={})


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("eval/loss", True),
        ("eval/nll/chosen", True),
        ("eval/rewards/accuracies", False),
        ("eval/chair/chair_i", True),
        ("eval/chair/recall", False),
    ],
)
def test_the_best_has_the_direction_of_its_metric(plan: Plan, metric: str, lower: bool) -> None:
    found = plan(keep_best=metric, held_out_groups=0.1)
    assert found is not None and found.lower_is_better == lower


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("chair_i", "eval/chair/chair_i"), ("eval/rewards/margin", "eval/rewards/margins"), ("loss", "eval/loss")],
)
def test_an_unknown_metric_is_refused_with_the_closest(
    plan: Plan, metric: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=f"train.keep_best is '{metric}'.*did you mean '{meant}'"):
        plan(keep_best=metric, held_out_groups=0.1)
    assert not caplog.records  # no warnings about answers that were not given


def test_metrics_that_are_not_evaluated_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="no metric of this evaluation"):
        plan(keep_best="eval/loss")  # no groups are held out
    with pytest.raises(ValueError, match="no metric of this evaluation"):
        plan(LossConfig(type="nll"), keep_best="eval/rewards/accuracies", held_out_groups=0.1)


def test_other_decoding_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluation.decoding is 'vcd'; while training, answers are decoded plainly"):
        plan(evaluation={"chair_instances": str(tmp_path / "instances.json"), "decoding": "vcd"})


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_best is 'eval/loss', but nothing is evaluated"):
        TrainConfig(keep_best="eval/loss")
    with pytest.raises(ValueError, match="held_out_groups is 2.5; give a share below 1, or a whole number"):
        TrainConfig(held_out_groups=2.5)
