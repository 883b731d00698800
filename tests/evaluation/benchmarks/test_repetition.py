"""Shares of distinct n-grams, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.evaluation.benchmarks.repetition import RepetitionBenchmark, RepetitionOptions, distinct_share
from bpo.evaluation.intervals import count_units


@pytest.mark.parametrize(
    "text, shares",
    [
        ("a b c d", (1, 1, 1, 1)),
        ("a dog a dog a dog", (2 / 6, 2 / 5, 2 / 4, 2 / 3)),
        ("A dog, a dog.", (3 / 4, 1, 1, 1)),  # case counts, punctuation does not
        ("end\nend", (1, None, None, None)),  # as the official script: a line break is removed, not a space
        ("a-b; a-b;", (1 / 2, 1, None, None)),
        ("", (None,) * 4),
    ],
)
def test_shares_of_distinct_ngrams(text: str, shares: tuple[float | None, ...]) -> None:
    for size, share in enumerate(shares, 1):
        assert distinct_share(text, size) == (share if share is None else pytest.approx(share))


def test_short_answers_do_not_count_for_long_ngrams(tmp_path: Path) -> None:
    (tmp_path / "images.txt").write_text("a.jpg\n\nb.jpg\nc.jpg\n")
    subject = RepetitionBenchmark.read(RepetitionOptions(images=str(tmp_path / "images.txt")))
    assert [(q.id, q.image, q.text) for q in subject.questions][0] == (
        "a.jpg",
        "a.jpg",
        "Describe this image in detail.",
    )
    answers = ["one one", "", "one two three"]
    scores = subject.score(answers)
    found = subject.metrics(count_units(subject.questions, answers, scores).sums())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"distinct_1": (0.5 + 1) / 2, "distinct_2": 1, "distinct_3": 1, "distinct_4": 0}
    )
    assert scores.items[0]["distinct_1"] == 0.5 and "distinct_4" not in scores.items[2]


def test_images_of_coco_and_the_answer_file(tmp_path: Path) -> None:
    instances = {
        "images": [{"id": 7, "file_name": "x.jpg"}],
        "annotations": [],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    subject = RepetitionBenchmark.read(RepetitionOptions(instances=str(tmp_path / "instances.json"), prompt="Say."))
    assert [(q.id, q.image, q.text) for q in subject.questions] == [("7", "x.jpg", "Say.")]
    suffix, content = subject.answer_file(["A dog."])
    assert suffix == ".json" and json.loads(content) == {"7": "A dog."}


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="option 'instances' is empty"):
        RepetitionBenchmark.read(RepetitionOptions())
    with pytest.raises(ValueError, match="missing.txt cannot be read"):
        RepetitionBenchmark.read(RepetitionOptions(images=str(tmp_path / "missing.txt")))
