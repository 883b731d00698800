"""POPE by its published definition, on cases made by hand."""

from __future__ import annotations

import pytest

from bpo.evaluation.pope import PopeMetrics, PopeQuestion, says_yes, score_answers


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("Yes.", True),
        ("yes", True),
        ("no,", False),
        ("No", False),
        ("No, there is a dog.", False),
        ("There is not a dog.", False),
        ("There is a dog. No cat though.", True),
        ("No\nThere is a dog", False),
        ("Nothing is known", True),
        ("I cannot see it", True),
        ("NO", True),  # as published: only No, no and not
        ("", True),
    ],
)
def test_the_published_reading_of_answers(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def question(number: int, label: bool, split: str = "random") -> PopeQuestion:
    return PopeQuestion(number, split, "x.png", "Is there a dog in the image?", label)


def test_the_metrics_by_hand() -> None:
    # labels  yes yes yes no no | answers  yes yes no yes yes: 2 true yes, 1 false no, 2 false yes
    questions = [question(n, label) for n, label in enumerate([True, True, True, False, False])]
    metrics = score_answers(questions, ["Yes.", "Yes", "There is not", "yes it is", "Yes"]).average
    assert metrics.accuracy == pytest.approx(2 / 5)
    assert metrics.precision == pytest.approx(2 / 4)
    assert metrics.recall == pytest.approx(2 / 3)
    assert metrics.f1 == pytest.approx(4 / 7)
    assert metrics.yes_ratio == pytest.approx(4 / 5)


def test_the_yes_ratio_is_of_the_answers_not_of_the_labels() -> None:
    metrics = score_answers([question(1, True), question(2, True)], ["No", "No"]).average
    assert metrics == PopeMetrics(accuracy=0.0, precision=0.0, recall=0.0, f1=0.0, yes_ratio=0.0)


def test_the_average_is_over_splits_not_over_questions() -> None:
    questions = [question(1, True), question(2, True), question(3, True), question(1, False, "adversarial")]
    result = score_answers(questions, ["Yes", "Yes", "Yes", "Yes"])
    assert list(result.splits) == ["random", "adversarial"]
    assert result.splits["random"].accuracy == 1.0 and result.splits["adversarial"].accuracy == 0.0
    assert result.average.accuracy == 0.5
    assert result.average.f1 == 0.5


def test_answers_must_match_questions() -> None:
    with pytest.raises(ValueError, match="1 questions and 0 answers"):
        score_answers([question(1, True)], [])
    with pytest.raises(ValueError, match="0 questions"):
        score_answers([], [])
