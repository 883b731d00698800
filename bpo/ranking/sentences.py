"""Verdicts on the sentences of answers, in the schema of FineSumFact (arXiv 2412.10689): filter, rates, records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpo.evaluation.benchmarks.verifier import OTHER
from bpo.ranking.judge import dialogue_of
from bpo.records import PreferenceGroup

NO_ERROR = "no error"
ENTITY = "entity"
CATEGORIES = (
    NO_ERROR,
    "out-of-context",
    ENTITY,
    "predicate",
    "circumstantial",
    "grammatical",
    "linking",
    "coreference",
    OTHER,
)


def keep_pair(labels_w: Sequence[bool], labels_l: Sequence[bool]) -> bool:
    """Whether a verifier confirms a pair: no hallucinated sentence is preferred, and at least one is rejected.

    Args:
        labels_w, labels_l: For each sentence of the preferred and the rejected answer, whether it is hallucinated.
    """
    return not any(labels_w) and any(labels_l)


def verifier_rates(predicted: Sequence[bool], gold: Sequence[bool]) -> tuple[float, float]:
    """(error rate, balanced accuracy) of a verifier on sentences with known labels; true is hallucinated.

    The error rate is the share of sentences that the verifier labels as hallucinated. The balanced accuracy is the mean
    of its accuracies on the sentences that are hallucinated and on those that are not; on one kind alone, its accuracy.

    Raises:
        ValueError: There are no sentences, or the numbers of labels differ.
    """
    if not gold or len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} predicted and {len(gold)} known labels; give both for the same sentences")
    kinds = [[bool(p) == kind for p, known in zip(predicted, gold, strict=True) if known == kind] for kind in (0, 1)]
    accuracies = [sum(correct) / len(correct) for correct in kinds if correct]
    return sum(map(bool, predicted)) / len(predicted), sum(accuracies) / len(accuracies)


def verdict_record(group: PreferenceGroup, index: int, details: Mapping[str, Any]) -> dict[str, Any]:
    """The verdicts on completion `index` as a record of the benchmark `verifier` (`bpo evaluate`).

    A JSONL file of such records is its `verdicts`, and with their `answer` also `evaluation.answers`.

    Args:
        details: Of the completion's score by a judge that labels sentences (`Scored.details`).
    """
    return {
        "id": f"{group.id}#{index}",
        **({"image": group.images[0]} if group.images else {}),
        "question": question_of(group),
        "answer": group.completions[index].response,
        "sentences": details["sentences"],
    }


def question_of(group: PreferenceGroup) -> str:
    """The text of the turns that ask."""
    return "\n".join(turn.text for turn in dialogue_of(group)[0])
