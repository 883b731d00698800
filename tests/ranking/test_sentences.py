"""Verdicts on sentences: which pairs they keep, rates on hand-labelled captions, records of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.evaluation.benchmarks.verifier import VerifierBenchmark, VerifierOptions
from bpo.evaluation.given_answers import read_answers
from bpo.evaluation.intervals import count_units
from bpo.evaluation.suite import Suite
from bpo.ranking.sentences import keep_pair, verdict_record, verifier_rates
from tests.sample_groups import group

# Captions of a photo of a dog on a red sofa, each with its sentences: (sentence, whether it is wrong).
CAPTIONS = [
    [("A dog lies on a red sofa.", False), ("A cat sleeps beside it.", True)],
    [("The sofa is blue.", True), ("There is one dog.", False), ("It stands in a kitchen.", True)],
    [("A dog rests.", False), ("The dog is on a sofa.", False)],
]
GOLD = [wrong for caption in CAPTIONS for _, wrong in caption]


def test_only_a_clean_answer_is_preferred_and_only_a_wrong_one_rejected() -> None:
    assert keep_pair([False, False], [False, True])
    assert not keep_pair([False, True], [True])
    assert not keep_pair([False], [False])
    assert not keep_pair([], [])


def test_rates_on_hand_labelled_captions() -> None:
    assert verifier_rates(GOLD, GOLD) == (3 / 7, 1.0)
    # Misses the colour and the kitchen, and takes the resting dog for wrong: 1 of 3 and 3 of 4 are right.
    predicted = [False, True, False, False, False, True, False]
    assert verifier_rates(predicted, GOLD) == (2 / 7, pytest.approx((1 / 3 + 3 / 4) / 2))
    assert verifier_rates([True, False], [True, True]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="1 predicted and 2 known labels"):
        verifier_rates([True], [True, False])


def test_records_are_verdicts_and_answers_of_the_benchmark(tmp_path: Path) -> None:
    answers = [" ".join(sentence for sentence, _ in caption) for caption in CAPTIONS]
    record = group("photo", *answers, image="dog.png")
    file = tmp_path / "verdicts.jsonl"
    with file.open("w") as lines:
        for index, caption in enumerate(CAPTIONS):
            listed = [{"sentence": text, "label": wrong, "category": "entity"} for text, wrong in caption]
            lines.write(json.dumps(verdict_record(record, index, {"sentences": listed})) + "\n")
    benchmark = VerifierBenchmark.read(VerifierOptions(verdicts=str(file)))
    (given,) = read_answers(file, Suite("s", (benchmark,)))
    assert given == answers
    scores = benchmark.score(given)
    found = benchmark.metrics(count_units(benchmark.questions, given, scores).sums())
    rates = {"hallucinated_sentences": 3 / 7, "hallucinated_answers": 2 / 3, "category/entity": 3 / 7}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(rates)
    assert [question.text for question in benchmark.questions] == ["What?"] * 3
