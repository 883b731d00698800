"""Format guard: answers that leave the asked form, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmark import YES_NO
from bpo.evaluation.benchmarks.format_guard import FormatGuardBenchmark, FormatGuardOptions
from bpo.evaluation.intervals import count_units

RECORDS = [
    {"image": "a.jpg", "text": "Is it red?", "label": "yes"},
    {"image": "a.jpg", "text": "Is it blue?", "label": "No", "kind": "yes_no"},
    {"image": "b.jpg", "text": "Is it big?", "label": "no"},
    {"image": "b.jpg", "text": "What is it?", "label": "dog"},
    {"image": "b.jpg", "text": "Why?", "label": "yes", "kind": "short"},
]


def benchmark(folder: Path, records: Sequence[dict[str, Any]] = RECORDS) -> FormatGuardBenchmark:
    (folder / "guard.json").write_text(json.dumps(list(records)))
    return FormatGuardBenchmark.read(FormatGuardOptions(questions=str(folder / "guard.json")))


def made(folder: Path, seed: int = 0) -> FormatGuardBenchmark:
    instances = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(40)],
        "annotations": [{"image_id": n, "category_id": n % 3 + c} for n in range(39) for c in (1, 2)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("cat", "orange", "dog", "hot dog", "bus"))],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return FormatGuardBenchmark.read(FormatGuardOptions(instances=str(folder / "instances.json"), seed=seed))


def metrics(subject: FormatGuardBenchmark, answers: Sequence[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


def test_the_figures_by_hand(tmp_path: Path) -> None:
    subject = benchmark(tmp_path)
    answers = ["**YES**, it is.", "Yes", "The image shows a big thing.", "Dogs.", "the answer to this is yes"]
    assert metrics(subject, answers) == pytest.approx(
        {
            "format": 3 / 5,
            "yes_no_readable": 2 / 3,
            "yes_no_accuracy": 1 / 3,
            "yes_ratio": 2 / 3,
            "short": 1 / 2,
            "short_accuracy": 1,  # the second names its label at length
        }
    )
    assert [question.labels for question in subject.questions] == [YES_NO, YES_NO, YES_NO, (), ()]
    assert subject.score(answers).items[2]["form"] is False


def test_kinds_that_are_not_asked_have_no_metrics(tmp_path: Path) -> None:
    path = tmp_path / "pope.json"
    path.write_text(json.dumps({"question_id": 7, "image": "a.jpg", "text": "Is it big?", "label": "yes"}))
    subject = FormatGuardBenchmark.read(FormatGuardOptions(questions=str(path)))
    assert [question.id for question in subject.questions] == ["7"]
    assert metrics(subject, ["Yes"]) == {"format": 1, "yes_no_readable": 1, "yes_no_accuracy": 1, "yes_ratio": 1}


def test_no_answer_has_no_form(tmp_path: Path) -> None:
    assert set(metrics(benchmark(tmp_path), [""] * 5).values()) == {0.0}


def test_questions_are_made_of_present_and_absent_objects(tmp_path: Path) -> None:
    subject = made(tmp_path)
    assert len(subject.questions) == 3 * 39  # the last image has no object
    texts = {question.id: question.text for question in subject.questions}
    names = ("cat", "orange", "dog", "hot dog", "bus")
    for number in range(39):
        present = {names[number % 3 + 1], names[number % 3 + 2]}
        asked = {label: texts[f"{number}/{label}"].split("Is there ")[1].split(" in the")[0] for label in ("yes", "no")}
        assert asked["yes"].split(" ", 1)[1] in present and asked["no"].split(" ", 1)[1] not in present
        assert set(subject.asked[f"{number}/short"].right) == present
    assert any("Is there an orange in the image? Please answer yes or no." == text for text in texts.values())
    assert texts["0/short"] == "Name one object in the image. Answer with a single word."
    answers = [
        "Yes." if q.id.endswith("yes") else "no" if q.id.endswith("no") else "A hot dog" for q in subject.questions
    ]
    found = metrics(subject, answers)
    assert found["format"] == found["yes_no_accuracy"] == 1 and found["yes_ratio"] == 0.5
    assert found["short_accuracy"] == pytest.approx(26 / 39)  # two in three images have a hot dog


def test_the_seed_draws_the_objects(tmp_path: Path) -> None:
    assert made(tmp_path).questions == made(tmp_path).questions != made(tmp_path, seed=1).questions


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": None}, "record 0: field 'label' is None"),
        ({"label": "?!"}, "field 'label' is '\\?!'; it must be a word"),
        ({"label": "red", "kind": "yes_no"}, "field 'label' is 'red'; it must be yes or no"),
        ({"kind": "long"}, "field 'kind' is 'long'"),
        ({"image": None}, "field 'image' is None"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, [RECORDS[0] | changes])


def test_without_a_file_it_is_refused() -> None:
    with pytest.raises(ValueError, match="option 'questions' is empty"):
        FormatGuardBenchmark.read(FormatGuardOptions())
