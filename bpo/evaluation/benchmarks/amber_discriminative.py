"""AMBER's discriminative part (arXiv 2311.07397): yes/no questions on existence, attributes and relations.

The positive class is "no": precision is over answers "No", recall over questions whose answer is no. As in the official
`inference.py`, only the exact answers "Yes" and "No" count (any other is wrong), denominators start at 0.001, and F1 is
computed from precision and recall rounded to a tenth of a percent, with 0.0001 (existence: 0.001) in its denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bpo.evaluation.benchmark import YES_NO, Benchmark, Scores, Sums, ratio
from bpo.evaluation.benchmarks.amber_files import START, AmberOptions, Annotated, official_answers, read_annotated
from bpo.evaluation.files import text_field

DIMENSION_OF_TYPE = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
# Name in the metrics -> dimensions that it sums; "" is the total.
_GROUPS = {
    "": ("existence", "state", "number", "action", "relation"),
    "existence/": ("existence",),
    "attribute/": ("state", "number", "action"),
    "state/": ("state",),
    "number/": ("number",),
    "action/": ("action",),
    "relation/": ("relation",),
}


@dataclass(kw_only=True)
class AmberDiscriminativeOptions(AmberOptions):
    """Options of AMBER's discriminative part; the suffix asks for the answers that count."""

    type: str = "amber_discriminative"
    suffix: str = "Please answer yes or no."


@dataclass(frozen=True, slots=True)
class Truth:
    """Dimension of a question, and its answer: yes or no."""

    dimension: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class AmberDiscriminativeBenchmark(Benchmark):
    """Yes/no questions of AMBER; question ids are AMBER's. `unreadable` is the share of answers of another form."""

    Options = AmberDiscriminativeOptions
    max_new_tokens: ClassVar[int] = 16
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"unreadable"})

    truth: Mapping[str, Truth]

    @classmethod
    def read(cls, options: AmberDiscriminativeOptions) -> AmberDiscriminativeBenchmark:
        found, files = read_annotated(options, "discriminative", YES_NO)
        return cls(
            options=options,
            questions=tuple(each.question for each in found),
            files=tuple(files),
            truth={each.question.id: _truth(each) for each in found},
        )

    def score(self, answers: Sequence[str]) -> Scores:
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            truth = self.truth[question.id]
            said = answer.lower() if answer in YES_NO else "unreadable"
            values = {
                "questions": True,
                "correct": said == truth.answer,
                "no": truth.answer == "no",
                "said_no": said == "no",
                "true_no": said == truth.answer == "no",
            }
            counts = {f"{truth.dimension}/{name}": float(value) for name, value in values.items()}
            rows.append((question.resampled, {**counts, "unreadable": float(said == "unreadable")}))
            items.append(question.item(answer, dimension=truth.dimension, label=truth.answer, read_as=said))
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for prefix, dimensions in _GROUPS.items():
            total = {
                name: sums.total(f"{dimension}/{name}" for dimension in dimensions)
                for name in ("questions", "correct", "no", "said_no", "true_no")
            }
            # The official total has denominators of its own; those of attributes are sums of three.
            start = START * len(dimensions) if prefix else START
            precision, recall = (total["true_no"] / (total[name] + start) for name in ("said_no", "no"))
            rounded, other = (np.round(100 * value, 1) / 100 for value in (precision, recall))
            values = {
                "accuracy": total["correct"] / (total["questions"] + start),
                "precision": precision,
                "recall": recall,
                "f1": 2 * rounded * other / (rounded + other + (1e-3 if prefix == "existence/" else 1e-4)),
            }
            found |= {f"{prefix}{name}": value for name, value in values.items()}
            if not prefix:
                found["unreadable"] = ratio(sums["unreadable"], total["questions"])
        return found

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        return official_answers(self.questions, answers)


def _truth(annotated: Annotated) -> Truth:
    kind, answer = (text_field(annotated.annotation, key, annotated.where) for key in ("type", "truth"))
    if kind not in DIMENSION_OF_TYPE or answer not in ("yes", "no"):
        raise ValueError(
            f"{annotated.where}: type {kind!r} with truth {answer!r}; use one of {', '.join(DIMENSION_OF_TYPE)} "
            "and yes or no"
        )
    return Truth(DIMENSION_OF_TYPE[kind], answer)
