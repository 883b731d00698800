"""SHR: sentences, verdicts line by line, ratios in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.evaluation.judge.sentences import sentences_of
from tests.evaluation.benchmarks import judged_files
from tests.evaluation.judge.test_ratings import metrics_of, rule_of

ANSWER = "A dog runs. It is brown. A dog. The sky is blue."


def test_parts_within_earlier_sentences_are_left_out() -> None:
    assert sentences_of(ANSWER) == ["A dog runs", "It is brown", "The sky is blue"]
    assert sentences_of(" . ") == []


def test_fields_have_regions_facts_and_numbered_sentences(tmp_path: Path) -> None:
    rule, benchmark = rule_of("shr", **judged_files.shr(tmp_path))
    assert rule.fields(benchmark.questions[0], ANSWER) == {
        "answer": ANSWER,
        "sentences": "1. A dog runs\n2. It is brown\n3. The sky is blue\n",
        "regions": "[0.1, 0.1, 0.6, 0.55]: a brown dog\n",
        "facts": "The dog is brown.\nIt is day.\n",
    }
    assert rule.fields(benchmark.questions[1], ANSWER)["facts"] == ""
    assert rule.settled(" . ") and not rule.settled("A dog")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (
            "Judgement:\n1. hallucination: no dog\n\n2. Correct: yes\n3. cannot judge: mood",
            ["hallucination", "correct", "cannot judge"],
        ),
        ("Well.\nJudgement:\n1. correct: a\n2. correct: b\n3. maybe: c", ["correct", "correct", "maybe"]),
        ("Judgement:\n1. correct: a\n2. correct: b", None),
        ("1. correct: a\n2. correct: b\n3. correct: c", None),
        ("", None),
    ],
)
def test_a_verdict_has_a_class_per_sentence(tmp_path: Path, reply: str, verdict: list[str] | None) -> None:
    rule, benchmark = rule_of("shr", **judged_files.shr(tmp_path))
    assert rule.read(benchmark.questions[0], ANSWER, reply) == verdict


def test_ratios_are_over_sentences_with_a_known_class(tmp_path: Path) -> None:
    rule, benchmark = rule_of("shr", **judged_files.shr(tmp_path))
    questions, answers = benchmark.questions, [ANSWER, "One two. Three four five."]
    verdicts = [["hallucination", "correct", "maybe"], ["cannot judge", "hallucination"]]
    rows = rule.rows(questions, answers, verdicts)
    assert rows[0] == (
        "VG_100K/3.jpg",
        {"images": 1, "sentences": 2, "words": 6, "false_sentences": 1, "false_words": 3},
    )
    assert rows[1][1] == {"images": 1, "sentences": 2, "words": 5, "false_sentences": 1, "false_words": 3}
    assert rule.rows(questions, answers, [None, None])[0][1]["sentences"] == 0
    found = metrics_of(rule, benchmark, ["Judgement:\n1. hallucination: x", "Judgement:\n1. correct: x"])
    assert found == {
        "hallucinated_sentences": 0.5,
        "hallucinated_words": 0.5,
        "hallucinated_sentences_per_image": 0.5,
    }


def test_images_without_regions_are_named(tmp_path: Path) -> None:
    options = judged_files.shr(tmp_path)
    judged_files.write(tmp_path / "region_descriptions.json", [{"id": 1, "regions": []}])
    with pytest.raises(ValueError, match=r"region_descriptions.json: 2 images have no regions, such as 1"):
        rule_of("shr", **options)
    judged_files.write(tmp_path / "region_descriptions.json", [{"id": 1, "regions": [{"image_id": 1, "phrase": "a"}]}])
    with pytest.raises(ValueError, match=r"region_descriptions.json, record 0: a region has another form \(KeyError"):
        rule_of("shr", **options)
