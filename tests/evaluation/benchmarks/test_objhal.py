"""Object HalBench's rule path."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmarks.objhal import ObjectHalBenchmark, ObjectHalOptions
from bpo.evaluation.intervals import count_units

NAMES = {1: "dog", 2: "cat", 3: "bus"}


def read(folder: Path, questions: list[dict[str, Any]], **options: Any) -> ObjectHalBenchmark:
    instances = {
        "images": [{"id": image, "file_name": f"COCO_val2014_{image}.jpg"} for image in (7, 8, 9)],
        "annotations": [{"image_id": i, "category_id": c} for i, c in ((7, 1), (7, 2), (8, 3), (9, 3))],
        "categories": [{"id": key, "name": name} for key, name in NAMES.items()],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in questions))
    paths = {
        name: str(folder / file) for name, file in (("instances", "instances.json"), ("questions", "questions.jsonl"))
    }
    return ObjectHalBenchmark.read(ObjectHalOptions(**paths, **options))


QUESTIONS = [
    {"image_id": 9, "question": "What do you see?", "image": "aGVsbG8="},
    {"image_id": "7", "question": "Describe it."},
    {"image_id": 8, "question": "Describe it."},
]


def test_the_figures_by_hand(tmp_path: Path) -> None:
    subject = read(tmp_path, QUESTIONS)
    # 4 mentions, 2 hallucinated in one of two answers that name an object; 2 of 4 present objects are named.
    answers = ["A bus and two dogs, one dog black.", "A cat.", "Something blue."]
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    assert {name: float(value) for name, value in subject.metrics(sums).items()} == pytest.approx(
        {"chair_s_refine": 1 / 2, "chair_s": 1 / 3, "chair_i": 2 / 4, "recall": 2 / 4}
    )
    first = subject.score(answers).items[0]
    assert first["hallucinated"] == ["dog", "dog"] and first["question"] == "What do you see?"


def test_the_name_of_the_result_says_that_it_is_the_rule_path(tmp_path: Path) -> None:
    assert read(tmp_path, QUESTIONS).name == "objhal (rule path)"


def test_images_are_those_of_the_instances(tmp_path: Path) -> None:
    subject = read(tmp_path, QUESTIONS, suffix="Be brief.")
    assert [question.image for question in subject.questions] == [f"COCO_val2014_{n}.jpg" for n in (9, 7, 8)]
    assert subject.questions[1].text == "Describe it. Be brief."
    assert "chair_s_refine" in subject.lower_is_better and "recall" not in subject.lower_is_better


def test_the_answer_file_is_what_the_official_script_reads(tmp_path: Path) -> None:
    suffix, content = read(tmp_path, QUESTIONS, suffix="Be brief.").answer_file(["a", "b", "c"])
    entries = [json.loads(line) for line in content.splitlines()]
    assert suffix == ".jsonl"
    assert entries[1] == {"question": "Describe it.", "answer": "b", "image_id": 7} and len(entries) == 3


@pytest.mark.parametrize(
    "questions, message",
    [
        ([{"image_id": 5, "question": "?"}], "line 1: image_id 5 is not in "),
        ([{"image_id": 7}], "line 1: field 'question' is None; it must be text"),
        (2 * [{"image_id": 7, "question": "?"}], "question id '7' is used twice"),
        ([], "the file contains no question"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, questions: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, questions)
