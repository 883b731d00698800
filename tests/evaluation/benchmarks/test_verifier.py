"""Rates by a verifier's verdicts, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmarks.verifier import VerifierBenchmark, VerifierOptions
from bpo.evaluation.intervals import count_units

RECORDS: list[dict[str, Any]] = [
    {
        "id": 1,
        "image": "a.jpg",
        "question": "What is there?",
        "sentences": [
            {"sentence": "A dog runs.", "label": 0},
            {"sentence": "It is red.", "label": "Hallucinated", "category": "Attribute"},
            {"sentence": "Two cats watch.", "label": 1, "category": "object"},
        ],
    },
    {"id": "b", "sentences": [{"sentence": "A red bus.", "label": True}]},
    {"id": "c", "model_summary": ["One.", "Two."], "label": [0, 0]},
    {"id": "d", "model_summary": ["Three."], "pred_general_factuality_labels": [1]},
    {"id": "e", "sentences": []},
]
ANSWERS = ["A dog  runs. It is RED. Two cats\nwatch.", "A red bus", "One. Two.", "Three.", ""]


def benchmark(folder: Path, records: list[dict[str, Any]] = RECORDS) -> VerifierBenchmark:
    (folder / "verdicts.json").write_text(json.dumps(records))
    return VerifierBenchmark.read(VerifierOptions(verdicts=str(folder / "verdicts.json")))


def test_the_rates_by_hand(tmp_path: Path) -> None:
    subject = benchmark(tmp_path)
    scores = subject.score(ANSWERS)
    found = subject.metrics(count_units(subject.questions, ANSWERS, scores).sums())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {
            "hallucinated_sentences": 4 / 7,
            "hallucinated_answers": 3 / 5,
            "category/attribute": 1 / 7,
            "category/object": 1 / 7,
            "category/other": 2 / 7,
        }
    )
    assert scores.items[0]["hallucinated"] == ["It is red.", "Two cats watch."]
    assert scores.items[0]["categories"] == ["attribute", "object"]


def test_questions_are_those_of_the_file_or_the_prompt(tmp_path: Path) -> None:
    first, second = benchmark(tmp_path).questions[:2]
    assert (first.id, first.image, first.text) == ("1", "a.jpg", "What is there?")
    assert (second.id, second.image, second.text) == ("b", "", "Describe this image in detail.")


def test_verdicts_about_another_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="id '1': the answer lacks the sentence 'Two cats watch.'"):
        benchmark(tmp_path).score(["A dog runs. It is red.", *ANSWERS[1:]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"id": None}, "record 0: field 'id' is None"),
        ({"sentences": "A dog."}, "field 'sentences' is 'A dog.'"),
        ({"sentences": [{"label": 0}]}, "sentence 0: field 'sentence' is None"),
        ({"sentences": [{"sentence": "A."}]}, "sentence 0: label None"),
        ({"sentences": [{"sentence": "A.", "label": 2}]}, "sentence 0: label 2"),
        ({"sentences": [{"sentence": "A.", "label": 1, "category": 3}]}, "category 3"),
        ({"image": 3}, "field 'image' is 3"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, [RECORDS[0] | changes])


def test_labels_must_match_sentences_and_ids_be_unique(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`model_summary` with as many labels"):
        benchmark(tmp_path, [{"id": 1, "model_summary": ["One."], "label": [0, 1]}])
    with pytest.raises(ValueError, match="question id 'e' is used twice"):
        benchmark(tmp_path, [RECORDS[-1], RECORDS[-1]])
    with pytest.raises(ValueError, match="option 'verdicts' is empty"):
        VerifierBenchmark.read(VerifierOptions())
