"""What a benchmark asks of a judge, and how its replies are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import Question, Sums


class Rule(ABC):
    """Judging of one benchmark.

    Attributes:
        placeholders: Names that the prompt may use.
        needed: Of these the prompt must use at least one.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("question", "answer", "reference")
    needed: ClassVar[tuple[str, ...]] = ("answer",)
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __init__(self, benchmark: Any):
        """Reads what only judging needs; raises ValueError if a file is missing or has another form."""

    @abstractmethod
    def fields(self, question: Question, answer: str) -> dict[str, str]:
        """The values of the placeholders."""

    def settled(self, answer: str) -> bool:
        """Whether no judge is asked about this answer; it is then read as an empty reply."""
        return False

    @abstractmethod
    def read(self, question: Question, answer: str, reply: str) -> Any:
        """The verdict in a reply, a JSON value; None if it cannot be read."""

    @abstractmethod
    def rows(
        self, questions: Sequence[Question], answers: Sequence[str], verdicts: Sequence[Any]
    ) -> list[tuple[str, Mapping[str, float]]]:
        """(unit, counts) of one run, for `Scores.rows`."""

    @staticmethod
    @abstractmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        """Metrics, elementwise over the arrays in `sums`."""


class RuleByAnswer(Rule):
    """A rule whose verdicts count each for itself."""

    @abstractmethod
    def counts(self, question: Question, answer: str, verdict: Any) -> Mapping[str, float]:
        """Counts of one verdict; of None, what the benchmark's script counts for an unreadable reply."""

    def rows(
        self, questions: Sequence[Question], answers: Sequence[str], verdicts: Sequence[Any]
    ) -> list[tuple[str, Mapping[str, float]]]:
        triples = zip(questions, answers, verdicts, strict=True)
        return [(question.resampled, self.counts(question, answer, verdict)) for question, answer, verdict in triples]


def grouped(sums: Sums, prefix: str) -> list[str]:
    """The rest of the names of counts that start with `prefix`, sorted."""
    return sorted(name.removeprefix(prefix) for name in sums if name.startswith(prefix))
