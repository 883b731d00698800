"""Multiple choice: how letters are read, and the figures by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmarks.choice import ChoiceBenchmark, ChoiceOptions, read_letter
from bpo.evaluation.given_answers import read_answers
from bpo.evaluation.intervals import count_units
from bpo.evaluation.suite import Suite

ANIMALS = {"A": "A cat", "B": "A dog", "C": "A hot dog", "D": "Two birds", "E": "None of the above"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C) A hot dog", "C"),
        ("**D.** Two birds", "D"),
        ("B: there is a dog", "B"),
        ("B because of the dog", "B"),
        ("A\nThe cat", "A"),
        ("Answer: B", "B"),
        ("The answer is (E).", "E"),
        ("The correct answer is option D, not A.", "D"),
        ("Answer A is wrong; the answer is C", "C"),
        ("I would choose D here.", "D"),
        ("A dog", "B"),
        ("It shows a hot dog.", "C"),
        ("none of the above", "E"),
        ("A dog or two birds", ""),
        ("B or C", ""),
        ("A lovely day", ""),
        ("F", ""),
        ("", ""),
        ("It's Bob's.", ""),
    ],
)
def test_letters_are_read(answer: str, letter: str) -> None:
    assert read_letter(answer, ANIMALS) == letter


def benchmark(folder: Path, *records: dict[str, Any], **options: Any) -> ChoiceBenchmark:
    (folder / "choice.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ChoiceBenchmark.read(ChoiceOptions(questions=str(folder / "choice.jsonl"), **options))


def record(label: str, kind: str, number: int = 0) -> dict[str, Any]:
    """A record as in HumbleBench."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in ANIMALS.items())
    return {
        "label": label,
        "question": f"What is it?\n{lines}",
        "type": kind,
        "image": {"path": "a.jpg"},
        "question_id": number,
    }


def metrics(subject: ChoiceBenchmark, answers: Sequence[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


def test_the_figures_by_hand(tmp_path: Path) -> None:
    records = [record(*each, number) for number, each in enumerate(zip("BEEAD", "OOORR", strict=True))]
    subject = benchmark(tmp_path, *records)
    assert metrics(subject, ["B", "E", "A", "E", "who knows"]) == pytest.approx(
        {
            "accuracy": 2 / 5,
            "none_of_the_above_accuracy": 1 / 2,
            "none_of_the_above_false": 1 / 3,
            "unreadable": 1 / 5,
            "O/accuracy": 2 / 3,
            "R/accuracy": 0,
        }
    )
    question = subject.questions[0]
    assert (question.id, question.image, question.labels) == ("0", "a.jpg", tuple("ABCDE"))
    assert question.text.endswith(
        "E. None of the above\nAnswer with the option's letter from the given choices directly."
    )
    item = subject.score(["b"] * 5).items[1]
    assert (item["label"], item["read_as"], item["right"], item["category"]) == ("E", "B", False, "O")


def test_options_may_be_a_list(tmp_path: Path) -> None:
    subject = benchmark(
        tmp_path, {"question": "Which?", "options": ["red", "blue"], "answer": "b"}, prompt="Letter only.", suffix="Go."
    )
    question = subject.questions[0]
    assert question.text == "Which?\nA. red\nB. blue\nLetter only. Go."
    assert (question.id, question.image) == ("0", "")
    assert metrics(subject, ["It is blue."])["accuracy"] == 1


def test_the_answer_file_is_that_of_humblebench_and_is_read_back(tmp_path: Path) -> None:
    subject = benchmark(tmp_path, record("B", "O", 7), record("A", "R", 8))
    suffix, content = subject.answer_file(["ü", "A"])
    assert suffix == ".jsonl"
    assert json.loads(content.splitlines()[0]) == record("B", "O", 7) | {"image": "a.jpg", "prediction": "ü"}
    (tmp_path / "answers.jsonl").write_text(content)
    assert read_answers(tmp_path / "answers.jsonl", Suite("s", (subject,))) == [["ü", "A"]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"question": None}, "line 1: field 'question' is None"),
        ({"question": "Why?"}, "line 1: there are no options"),
        ({"options": [1, 2]}, r"field 'options' is \[1, 2\]"),
        ({"options": ["red", "?"]}, "there are no options"),
        ({"label": "F"}, "the answer is 'F'; it must be one of A, B"),
        ({"image": 3}, "the image is 3"),
        ({"question_id": None}, "field 'question_id' is None"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, record("B", "O") | changes)


def test_equal_ids_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="question id '0' is used twice"):
        benchmark(tmp_path, record("B", "O"), record("A", "O"))
    with pytest.raises(ValueError, match="option 'questions' is empty"):
        ChoiceBenchmark.read(ChoiceOptions())
