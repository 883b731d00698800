"""AMBER's yes/no figures by a plain count."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from bpo.evaluation.benchmarks.amber_discriminative import (
    DIMENSION_OF_TYPE,
    AmberDiscriminativeBenchmark,
    AmberDiscriminativeOptions,
)
from bpo.evaluation.intervals import count_units
from tests.evaluation.benchmarks.amber_folder import write_folder

ATTRIBUTES = ("state", "number", "action")


def read(folder: Path, questions: dict[int, tuple[str, str]]) -> AmberDiscriminativeBenchmark:
    data = write_folder(folder / "data", {}, questions)
    return AmberDiscriminativeBenchmark.read(AmberDiscriminativeOptions(data=str(data)))


def figures(subject: AmberDiscriminativeBenchmark, answers: list[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


def by_definition(rows: list[tuple[str, str]], start: float, epsilon: float) -> dict[str, float]:
    """Figures of (right answer, given answer); no is the positive class."""
    right = no = said_no = both = 0
    for truth, given in rows:
        right += (truth == "yes" and given == "Yes") or (truth == "no" and given == "No")
        no += truth == "no"
        said_no += given == "No"
        both += truth == "no" and given == "No"
    precision, recall = both / (said_no + start), both / (no + start)
    p, r = round(precision * 100, 1) / 100, round(recall * 100, 1) / 100
    accuracy = right / (len(rows) + start)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": 2 * p * r / (p + r + epsilon)}


def test_generated_answers_agree_with_the_definition(tmp_path: Path) -> None:
    rng = random.Random(11)
    kinds = sorted(DIMENSION_OF_TYPE)
    questions = {n: (rng.choice(kinds), rng.choice(["yes", "no", "no"])) for n in range(1005, 1905)}
    answers = [rng.choice(["Yes", "No", "No", "yes", "No.", " No", "NO", "", "Yes, it is"]) for _ in questions]
    rows = [(*question, answer) for question, answer in zip(questions.values(), answers, strict=True)]
    expected = {"unreadable": sum(answer not in ("Yes", "No") for answer in answers) / len(answers)}
    groups = {
        "": (set(kinds), 0.001, 1e-4),
        "existence/": ({"discriminative-hallucination"}, 0.001, 1e-3),
        "attribute/": ({f"discriminative-attribute-{name}" for name in ATTRIBUTES}, 0.003, 1e-4),
        "relation/": ({"discriminative-relation", "relation"}, 0.001, 1e-4),
        **{f"{name}/": ({f"discriminative-attribute-{name}"}, 0.001, 1e-4) for name in ATTRIBUTES},
    }
    for prefix, (of_group, start, epsilon) in groups.items():
        values = by_definition([(truth, given) for kind, truth, given in rows if kind in of_group], start, epsilon)
        expected |= {prefix + name: value for name, value in values.items()}
    assert figures(read(tmp_path, questions), answers) == pytest.approx(expected, abs=1e-12)


def test_only_the_exact_words_count(tmp_path: Path) -> None:
    subject = read(tmp_path, {1005: ("relation", "no"), 1006: ("relation", "no"), 1007: ("relation", "yes")})
    items = subject.score(["No", "no", "Yes."]).items
    assert [item["read_as"] for item in items] == ["no", "unreadable", "unreadable"]
    assert figures(subject, ["No", "no", "Yes."])["accuracy"] == pytest.approx(1 / 3.001)


def test_questions_ask_for_yes_or_no(tmp_path: Path) -> None:
    (question,) = read(tmp_path, {1005: ("relation", "no")}).questions
    assert question.text == "Question 1005? Please answer yes or no." and question.labels == ("Yes", "No")


def test_the_answer_file_is_what_the_official_script_reads(tmp_path: Path) -> None:
    suffix, content = read(tmp_path, {1005: ("relation", "no")}).answer_file(["No"])
    assert (suffix, json.loads(content)) == (".json", [{"id": 1005, "response": "No"}])


@pytest.mark.parametrize("annotation", [("relation", "maybe"), ("colour", "no")])
def test_other_types_and_answers_are_refused(tmp_path: Path, annotation: tuple[str, str]) -> None:
    message = f"type {annotation[0]!r} with truth {annotation[1]!r}; use one of discriminative-hallucination"
    with pytest.raises(ValueError, match=f"annotations.json, record 0: {re.escape(message)}"):
        read(tmp_path, {1005: annotation})
