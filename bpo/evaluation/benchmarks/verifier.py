"""Rates of hallucinated sentences by the verdicts of a verifier, in the schema of FineSumFact (arXiv 2412.10689).

A verifier (a language model, a trained classifier, or people) labels each sentence of an answer and, if it is
hallucinated, names a category. It runs elsewhere; this benchmark joins its verdicts to answers and counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.files import id_field, text_field, unique_ids
from bpo.formats.jsonfiles import read_records

PROMPT = "Describe this image in detail."
LABELS = {
    **dict.fromkeys(("0", "false", "faithful", "correct", "no error"), False),
    **dict.fromkeys(("1", "true", "hallucinated", "hallucination", "unfaithful", "incorrect"), True),
}
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence, whether it is hallucinated, and as what (empty if it is not)."""

    sentence: str
    hallucinated: bool
    category: str


@dataclass(kw_only=True)
class VerifierOptions(BenchmarkOptions):
    """Options of a verifier's verdicts.

    Attributes:
        verdicts: Records with `id`, `sentences` (a list of objects with `sentence`, `label` and optionally
            `category`), and optionally `image` and `question`. Instead of `sentences`, FineSumFact's own
            `model_summary` (sentences) with `label` or `pred_general_factuality_labels` (0 or 1 for each). JSONL or one
            list. 1, true, hallucinated, hallucination, unfaithful and incorrect label a hallucination; 0, false,
            faithful, correct and no error the opposite.
    """

    type: str = "verifier"
    verdicts: str = ""


@dataclass(frozen=True, kw_only=True)
class VerifierBenchmark(Benchmark):
    """`hallucinated_sentences`: share of sentences; `hallucinated_answers`: share with at least one; `category/NAME`.

    Rates of categories are shares of all sentences. Answers usually come from `evaluation.answers`: verdicts hold for
    the text that the verifier read.
    """

    Options = VerifierOptions
    files_follow_answers: ClassVar[bool] = True
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"hallucinated_sentences", "hallucinated_answers"})

    verdicts: dict[str, tuple[Verdict, ...]]

    @classmethod
    def read(cls, options: VerifierOptions) -> VerifierBenchmark:
        path = options.path("verdicts")
        questions, verdicts = [], {}
        for record in read_records(path):
            entry, where = record.value, record.where
            id = str(id_field(entry, "id", where))
            image = text_field(entry, "image", where) if "image" in entry else ""
            text = text_field(entry, "question", where) if "question" in entry else options.prompt or PROMPT
            questions.append(Question(id=id, image=image, text=options.asked(text)))
            verdicts[id] = _verdicts(entry, where)
        unique_ids(questions, str(path))
        return cls(options=options, questions=tuple(questions), files=(str(path),), verdicts=verdicts)

    def score(self, answers: Sequence[str]) -> Scores:
        """Counts the verdicts.

        Raises:
            ValueError: A sentence does not occur in its answer; letters and digits are compared.
        """
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            verdicts = self.verdicts[question.id]
            for verdict in verdicts:
                if _letters(verdict.sentence) not in _letters(answer):
                    raise ValueError(
                        f"{self.files[0]}, id {question.id!r}: the answer lacks the sentence {verdict.sentence!r}; "
                        "give the answers that were verified (evaluation.answers), or verify these"
                    )
            found = [verdict.category for verdict in verdicts if verdict.hallucinated]
            counts = {"sentences": len(verdicts), "hallucinated": len(found), "asked": 1, "with": bool(found)}
            counts |= {f"category/{category}": found.count(category) for category in found}
            rows.append((question.resampled, {name: float(count) for name, count in counts.items()}))
            items.append(
                question.item(answer, hallucinated=[v.sentence for v in verdicts if v.hallucinated], categories=found)
            )
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {
            "hallucinated_sentences": ratio(sums["hallucinated"], sums["sentences"]),
            "hallucinated_answers": ratio(sums["with"], sums["asked"]),
            **{name: ratio(sums[name], sums["sentences"]) for name in sums if name.startswith("category/")},
        }


def _verdicts(entry: dict[str, Any], where: str) -> tuple[Verdict, ...]:
    if "sentences" in entry:
        listed = entry["sentences"]
    else:
        sentences, labels = entry.get("model_summary"), entry.get("label", entry.get("pred_general_factuality_labels"))
        if not isinstance(sentences, list) or not isinstance(labels, list) or len(sentences) != len(labels):
            raise ValueError(f"{where}: give a list `sentences`, or `model_summary` with as many labels")
        listed = [{"sentence": text, "label": label} for text, label in zip(sentences, labels, strict=True)]
    if not isinstance(listed, list):
        raise ValueError(f"{where}: field 'sentences' is {listed!r}; it must be a list of objects")
    return tuple(_verdict(sentence, f"{where}, sentence {number}") for number, sentence in enumerate(listed))


def _verdict(entry: Any, where: str) -> Verdict:
    text = text_field(entry, "sentence", where)
    label = LABELS.get(str(entry.get("label")).strip().lower())
    category = entry.get("category") or OTHER
    if label is None or not isinstance(category, str):
        raise ValueError(
            f"{where}: label {entry.get('label')!r}, category {category!r}; the label must be one of "
            f"{', '.join(LABELS)}, the category text"
        )
    return Verdict(text, label, category.strip().lower() if label else "")


def _letters(text: str) -> str:
    return re.sub(r"\W", "", text.lower())
