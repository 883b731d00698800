"""Ratings of MMHal-Bench, MM-Vet and LLaVA-Bench: replies and metrics in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmark import Scores
from bpo.evaluation.benchmarks.registry import BENCHMARKS
from bpo.evaluation.intervals import count_units
from bpo.evaluation.judge.rule import Rule
from bpo.evaluation.judge.rules import RULES
from tests.evaluation.benchmarks import judged_files


def rule_of(name: str, **options: Any) -> tuple[Rule, Any]:
    kind = BENCHMARKS[name]
    benchmark = kind.read(kind.Options(type=name, **options))
    return RULES[name](benchmark), benchmark


def metrics_of(rule: Rule, benchmark: Any, replies: list[str]) -> dict[str, float]:
    answers = [f"answer {number}" for number in range(len(replies))]
    triples = zip(benchmark.questions, answers, replies, strict=True)
    verdicts = [rule.read(question, answer, reply) for question, answer, reply in triples]
    rows = rule.rows(benchmark.questions, answers, verdicts)
    sums = count_units(benchmark.questions, answers, Scores(tuple(rows), ())).sums()
    return {name: float(value) for name, value in rule.metrics(sums).items()}


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is right.\n- Rating: 5, very informative", 5),
        ("RATING: 0", 0),
        ("rating: 3 ... rating: 3", 3),
        ("Rating: 2 or Rating: 4", None),
        ("I rate it 4", None),
        ("", None),
    ],
)
def test_mmhal_takes_the_only_rating_in_a_reply(tmp_path: Path, reply: str, rating: int | None) -> None:
    rule, benchmark = rule_of("mmhal", questions=judged_files.mmhal(tmp_path))
    assert rule.read(benchmark.questions[0], "", reply) == rating


def test_mmhal_metrics(tmp_path: Path) -> None:
    rule, benchmark = rule_of("mmhal", questions=judged_files.mmhal(tmp_path))
    ratings = [6, 5, 4, 3, 2, 1, 0, 6] + [2, 5, 4, 3, 2, 1, 0, None]
    replies = ["no number" if rating is None else f"Rating: {rating}" for rating in ratings]
    found = metrics_of(rule, benchmark, replies)
    assert found["score"] == pytest.approx(44 / 16)
    assert found["hallucination_rate"] == pytest.approx(8 / 16)  # the unreadable one counts as 0
    assert [found[f"score/kind {kind}"] for kind in range(8)] == [4, 5, 4, 3, 2, 1, 0, 3]


def test_mmhal_types_without_names_are_positions_mod_8(tmp_path: Path) -> None:
    rule, benchmark = rule_of("mmhal", questions=judged_files.mmhal(tmp_path))
    for record in benchmark.records.values():
        del record["question_type"]
    found = metrics_of(rule, benchmark, [f"Rating: {number % 8 % 7}" for number in range(16)])
    assert [found[f"score/{kind}"] for kind in range(8)] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_mmhal_fields(tmp_path: Path) -> None:
    rule, benchmark = rule_of("mmhal", questions=judged_files.mmhal(tmp_path))
    assert rule.fields(benchmark.questions[2], "A cat.") == {
        "question": "What is at 2?",
        "answer": "A cat.",
        "reference": "A dog at 2.",
        "image_content": "dog, ball",
    }
    benchmark.records["2"]["image_content"] = "dog"
    with pytest.raises(ValueError, match="record 2: field 'image_content' is 'dog'"):
        rule.fields(benchmark.questions[2], "A cat.")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("0.7", 0.7),
        (" 1.0 because", 1.0),
        ("0", 0.0),
        ("1.2", None),
        ("-0.1", None),
        ("nan", None),
        ("Good", None),
        ("", None),
    ],
)
def test_mmvet_takes_the_first_word_as_score(tmp_path: Path, reply: str, score: float | None) -> None:
    rule, benchmark = rule_of("mmvet", questions=judged_files.mmvet(tmp_path))
    assert rule.read(benchmark.questions[0], "", reply) == score


def test_mmvet_metrics_and_fields(tmp_path: Path) -> None:
    rule, benchmark = rule_of("mmvet", questions=judged_files.mmvet(tmp_path))
    found = metrics_of(rule, benchmark, ["0.5", "1.0", "what"])
    assert found == pytest.approx({"score": 50, "score/math": 50, "score/ocr": 25, "score/rec": 50})
    assert rule.fields(benchmark.questions[0], "5")["reference"] == "-1 <AND> -5"
    assert rule.fields(benchmark.questions[1], "5")["reference"] == "a cat <OR> a dog"


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 6\nBecause", [8, 6]),
        ("8.5, 9", [8.5, 9]),
        ("\n7,7", [7, 7]),
        ("8", None),
        ("8 9 7", None),
        ("A 8", None),
        ("", None),
    ],
)
def test_llava_bench_takes_two_scores_of_the_first_line(tmp_path: Path, reply: str, scores: list[float] | None) -> None:
    rule, benchmark = rule_of("llava_bench", **judged_files.llava_bench(tmp_path))
    assert rule.read(benchmark.questions[0], "", reply) == scores


def test_llava_bench_metrics_and_fields(tmp_path: Path) -> None:
    rule, benchmark = rule_of("llava_bench", **judged_files.llava_bench(tmp_path))
    found = metrics_of(rule, benchmark, ["8 4", "10 9", "no idea", "2 4"])
    assert found == pytest.approx({"score": 85, "score/conv": 80, "score/detail": 90, "score/complex": 0})
    assert rule.fields(benchmark.questions[3], "Yes.") == {
        "question": "Question 3",
        "answer": "Yes.",
        "reference": "Reference 3",
        "context": "A dog.\nNumber 1.",
        "rule": "Rate conv.",
        "role": "Writer",
    }


def test_llava_bench_names_what_a_file_lacks(tmp_path: Path) -> None:
    options = judged_files.llava_bench(tmp_path)
    with pytest.raises(ValueError, match="option 'rules' is empty"):
        rule_of("llava_bench", **{**options, "rules": ""})
    judged_files.write(tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}])
    with pytest.raises(ValueError, match="question 1: '1' is not in the file of option 'references'"):
        rule_of("llava_bench", **options)
