"""POPE: yes/no questions about present and absent objects (arXiv 2305.10355).

"yes" is the positive class. Each metric is computed per split (random, popular, adversarial: how the absent objects
were chosen) and then averaged over the splits. A ratio with denominator 0 is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from bpo.evaluation.chair import ratio


@dataclass(frozen=True, slots=True)
class PopeQuestion:
    """A yes/no question about an image; `label` is True if yes is correct."""

    question_id: int | str
    split: str
    image: str
    text: str
    label: bool


@dataclass(frozen=True, slots=True)
class PopeMetrics:
    """Fractions in [0, 1]; `yes_ratio` is the fraction of *answers* that are yes, regardless of the labels."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


@dataclass(frozen=True, slots=True)
class PopeResult:
    """Metrics of each split, in the order of their first question, their mean, and the raw answers."""

    splits: dict[str, PopeMetrics]
    average: PopeMetrics
    questions: tuple[PopeQuestion, ...]
    answers: tuple[str, ...]


def says_yes(answer: str) -> bool:
    """The published rule: the word "No", "no" or "not" in the first sentence is a no, anything else a yes.

    The sentence ends at a full stop; commas are removed. Words are split at any white space (published: at spaces), so
    "No\\nThere is ..." is a no.
    """
    words = answer.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def score_answers(questions: Sequence[PopeQuestion], answers: Sequence[str]) -> PopeResult:
    """Computes POPE metrics of free-text answers.

    Raises:
        ValueError: Questions and answers differ in number, or there are none.
    """
    if len(questions) != len(answers) or not questions:
        raise ValueError(f"{len(questions)} questions and {len(answers)} answers; give one answer per question")
    by_split: dict[str, list[tuple[bool, bool]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        by_split.setdefault(question.split, []).append((says_yes(answer), question.label))
    splits = {split: metrics_of(pairs) for split, pairs in by_split.items()}
    mean = [sum(getattr(m, f.name) for m in splits.values()) / len(splits) for f in fields(PopeMetrics)]
    return PopeResult(splits, PopeMetrics(*mean), tuple(questions), tuple(answers))


def metrics_of(pairs: Sequence[tuple[bool, bool]]) -> PopeMetrics:
    """Metrics of (answered yes, yes is correct) pairs."""
    true_yes = sum(answered and label for answered, label in pairs)
    answered_yes = sum(answered for answered, _ in pairs)
    labelled_yes = sum(label for _, label in pairs)
    precision, recall = ratio(true_yes, answered_yes), ratio(true_yes, labelled_yes)
    return PopeMetrics(
        accuracy=ratio(sum(answered == label for answered, label in pairs), len(pairs)),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        yes_ratio=ratio(answered_yes, len(pairs)),
    )
