"""The judge `chair`: scores on captions made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.config.evaluation import EvaluationConfig
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.chair import ChairJudge
from bpo.records import PreferenceGroup
from tests.ranking.candidates import config_of, judged
from tests.sample_groups import group

INSTANCES = {
    "images": [{"id": 1, "file_name": "wide.png"}, {"id": 2, "file_name": "tall.png"}],
    "annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 1, "category_id": 2}],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "bus"}],
}
CAPTIONS = group("g", "A dog, two buses and a bus.", "A dog and a cat.", "Something blue.", "A bus.")


def judge(folder: Path, evaluation: EvaluationConfig | None = None, **options: Any) -> ChairJudge:
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    if evaluation is None and "detections" not in options:
        options["instances"] = str(folder / "instances.json")
    config = replace(config_of(folder / "c.jsonl", "chair", options), evaluation=evaluation or EvaluationConfig())
    return ChairJudge(config, Ranks())


def scores(subject: ChairJudge, record: PreferenceGroup = CAPTIONS) -> tuple[float, ...]:
    (result,) = judged(subject, record)
    assert isinstance(result, Scored)
    return result.scores


def test_scores_and_details_by_hand(tmp_path: Path) -> None:
    assert scores(judge(tmp_path)) == (-2, 0, 0, -1)
    assert scores(judge(tmp_path, score="rate")) == pytest.approx((-2 / 3, 0, 0, -1))
    assert scores(judge(tmp_path, recall=2.0)) == (-2 + 1, 2, 0, -1)
    assert scores(judge(tmp_path, score="rate", recall=0.5)) == pytest.approx((-2 / 3 + 0.25, 0.5, 0, -1))
    (result,) = judged(judge(tmp_path), CAPTIONS)
    assert isinstance(result, Scored)
    assert result.details[0] == {"named": ["dog"], "hallucinated": ["bus", "bus"], "missed": ["cat"]}


def test_captions_and_synonyms_of_the_evaluation_are_used(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "A coach."}]}))
    (tmp_path / "synonyms.txt").write_text("dog\ncat\nbus, coach\n")
    paths = {name: str(tmp_path / file) for name, file in (("chair_captions", "captions.json"),)}
    evaluation = EvaluationConfig(
        chair_instances=str(tmp_path / "instances.json"), synonyms=str(tmp_path / "synonyms.txt"), **paths
    )
    subject = judge(tmp_path, evaluation)
    assert scores(subject) == (0, 0, 0, 0)
    before = subject.identity()
    (tmp_path / "synonyms.txt").write_text("dog\ncat\nbus, coach, tram\n")
    after = judge(tmp_path, evaluation).identity()
    assert [name for name in after if after[name] != before[name]] == ["synonyms (SHA-256)"]


def test_the_objects_of_several_images_are_together(tmp_path: Path) -> None:
    both = replace(CAPTIONS, images=("tall.png", "wide.png"))
    assert scores(judge(tmp_path), both) == (-2, 0, 0, -1)
    assert scores(judge(tmp_path), replace(CAPTIONS, images=("tall.png",))) == (-3, -2, 0, -1)


def test_an_image_without_truth_fails_its_group_alone(tmp_path: Path) -> None:
    first, second = judged(judge(tmp_path), replace(CAPTIONS, images=("square.png",)), CAPTIONS)
    assert first == Failed("no objects are known of its image: square.png") and isinstance(second, Scored)


def test_a_detectors_output_is_truth_too(tmp_path: Path) -> None:
    lines = [{"image": "coco/wide.png", "objects": ["dog", "cat"]}, {"image": "wide.png", "objects": ["bus"]}]
    path = tmp_path / "detections.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    subject = judge(tmp_path, detections=str(path))
    assert scores(subject, replace(CAPTIONS, images=("coco/wide.png",))) == (-2, 0, 0, -1)
    assert scores(subject, replace(CAPTIONS, images=("elsewhere/wide.png",))) == (-1, -2, 0, 0)  # by its name alone
    path.write_text('{"image": "wide.png"}\n')
    with pytest.raises(ValueError, match=r'detections.jsonl: .*write lines of \{"image": path, "objects"'):
        judge(tmp_path, detections=str(path))


def test_without_any_truth_the_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set rank.options.instances or detections"):
        judge(tmp_path, EvaluationConfig())
