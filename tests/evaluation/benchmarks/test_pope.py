"""POPE by its published definition, on cases made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmark import YES_NO
from bpo.evaluation.benchmarks.pope import PopeBenchmark, PopeOptions, is_unreadable, says_yes
from bpo.evaluation.intervals import count_units


@pytest.mark.parametrize(
    "answer, yes, unreadable",
    [
        ("Yes.", True, False),
        ("yes", True, False),
        ("**Yes**, there is.", True, False),
        ("no,", False, False),
        ("No", False, False),
        ("No, there is a dog.", False, False),
        ("There is not a dog.", False, False),
        ("No\nThere is a dog", False, False),
        ("There is a dog. No cat though.", True, True),
        ("There isn't a dog.", True, True),
        ("Nothing is known", True, True),
        ("I cannot see it", True, True),
        ("NO!", True, True),  # as published: only No, no and not
        ("**No**", True, True),
        ("Sure", True, True),
        ("", True, True),
    ],
)
def test_the_published_reading_of_answers(answer: str, yes: bool, unreadable: bool) -> None:
    assert (says_yes(answer), is_unreadable(answer)) == (yes, unreadable)


def line(number: int, label: str, **changes: Any) -> str:
    entry = {"question_id": number, "image": "a.jpg", "text": "Is there a dog in the image?", "label": label}
    return json.dumps(entry | changes) + "\n"


def benchmark(folder: Path, suffix: str = "", **labels: Sequence[str]) -> PopeBenchmark:
    """One file per split, with the labels of its questions."""
    files = []
    for split, of_split in labels.items():
        files.append(folder / f"coco_pope_{split}.json")
        files[-1].write_text("".join(line(n, label) for n, label in enumerate(of_split)))
    return PopeBenchmark.read(PopeOptions(questions=[str(file) for file in files], suffix=suffix))


def metrics(subject: PopeBenchmark, answers: Sequence[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


def test_the_metrics_by_hand(tmp_path: Path) -> None:
    # labels  yes yes yes no no | answers  yes yes no yes yes: 2 true yes, 1 false no, 2 false yes
    subject = benchmark(tmp_path, random=["yes", "yes", "yes", "no", "No"])
    found = metrics(subject, ["Yes.", "Yes", "There is not", "yes it is", "YES"])
    expected = {"accuracy": 2 / 5, "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "yes_ratio": 4 / 5}
    for group in ("random", "macro", "micro"):
        assert {name: found[f"{group}/{name}"] for name in expected} == pytest.approx(expected)
    assert (found["accuracy"], found["f1"], found["yes_ratio"]) == pytest.approx((2 / 5, 4 / 7, 4 / 5))
    assert found["unreadable"] == 0


def test_the_yes_ratio_is_of_the_answers_not_of_the_labels(tmp_path: Path) -> None:
    found = metrics(benchmark(tmp_path, random=["yes", "yes"]), ["No", "No"])
    assert {found[name] for name in ("accuracy", "f1", "yes_ratio", "macro/precision", "macro/recall")} == {0.0}


def test_macro_is_over_splits_and_micro_over_questions(tmp_path: Path) -> None:
    subject = benchmark(tmp_path, random=["yes", "yes", "yes"], adversarial=["no"])
    found = metrics(subject, ["Yes", "Yes", "Yes", "Yes!"])
    assert found["random/accuracy"] == 1 and found["adversarial/accuracy"] == 0
    assert found["accuracy"] == found["macro/accuracy"] == 0.5 and found["micro/accuracy"] == 0.75
    assert found["f1"] == 0.5 and found["micro/f1"] == pytest.approx(6 / 7)


def test_unreadable_answers_count_over_all_splits(tmp_path: Path) -> None:
    subject = benchmark(tmp_path, random=["yes", "no"], popular=["no", "no"])
    answers = ["Yes", "NO!", "", "No"]
    assert metrics(subject, answers)["unreadable"] == 0.5
    item = subject.score(answers).items[1]
    assert (item["id"], item["split"], item["label"], item["read_as"]) == ("random/1", "random", "no", "yes")
    assert item["unreadable"] is True


def test_questions_offer_yes_and_no_and_carry_the_suffix(tmp_path: Path) -> None:
    question = benchmark(tmp_path, suffix="Answer yes or no.", random=["yes"]).questions[0]
    assert question.labels == YES_NO
    assert question.text == "Is there a dog in the image? Answer yes or no."


def test_the_answer_file_is_that_of_the_official_script(tmp_path: Path) -> None:
    suffix, content = benchmark(tmp_path, random=["yes"], popular=["no"]).answer_file(["Yes", "No\nDog"])
    assert suffix == ".jsonl"
    assert [json.loads(row) for row in content.splitlines()] == [
        {"question": "Is there a dog in the image?", "answer": "Yes", "split": "random"},
        {"question": "Is there a dog in the image?", "answer": "No\nDog", "split": "popular"},
    ]


def test_splits_come_from_the_file_name_or_a_field(tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text(
        line(1, "yes", category="adversarial") + line(1, "no", split="random") + line(1, "no")
    )
    subject = PopeBenchmark.read(PopeOptions(questions=[str(tmp_path / "mixed.jsonl")]))
    assert [question.id for question in subject.questions] == ["adversarial/1", "random/1", "mixed/1"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": None}, "line 2: field 'label' is None; it must be yes or no"),
        ({"label": "maybe"}, "'maybe'"),
        ({"image": 3}, "line 2: field 'image' is 3"),
        ({"question_id": None}, "line 2: field 'question_id' is None"),
        ({"split": "micro"}, "line 2: the split is 'micro'"),
        ({"question_id": 1}, "question id 'random/1' is used twice"),
    ],
)
def test_a_bad_question_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "pope_random.json"
    path.write_text(line(1, "yes") + line(**{"number": 2, "label": "yes"} | changes))
    with pytest.raises(ValueError, match=message):
        PopeBenchmark.read(PopeOptions(questions=[str(path)]))


def test_no_file_and_no_question_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pope_random.json").write_text("\n")
    with pytest.raises(ValueError, match="no question"):
        PopeBenchmark.read(PopeOptions(questions=[str(tmp_path / "pope_random.json")]))
    with pytest.raises(ValueError, match="'questions' is empty"):
        PopeBenchmark.read(PopeOptions())
