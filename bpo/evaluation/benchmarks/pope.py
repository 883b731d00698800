"""POPE: yes/no questions about present and absent objects (arXiv 2305.10355).

"yes" is the positive class. The splits (random, popular, adversarial) differ in how the absent objects were chosen.
Metrics are given by split (`random/f1`), as mean over the splits (`macro/f1`, and without a prefix, as papers report
them) and over all questions at once (`micro/f1`). A ratio with denominator 0 is 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from bpo.evaluation.benchmark import YES_NO, Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.files import id_field, text_field, unique_ids
from bpo.formats.jsonfiles import read_records

SPLITS = ("random", "popular", "adversarial")
HEADLINE = ("accuracy", "f1", "yes_ratio")
_LABELS = {"yes": True, "no": False}
_COUNTS = ("questions", "correct", "true_yes", "answered_yes", "labelled_yes")


def says_yes(answer: str) -> bool:
    """The published rule: the word "No", "no" or "not" in the first sentence is a no, anything else a yes.

    The sentence ends at a full stop; commas are removed. Words are split at any white space (published: at spaces), so
    "No\\nThere is ..." is a no.
    """
    words = answer.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def first_word(answer: str) -> str:
    """The first run of letters in lower case, so without punctuation and markup; empty if there is none."""
    found = re.search(r"[^\W\d_]+", answer)
    return found.group().lower() if found else ""


def is_unreadable(answer: str) -> bool:
    """Whether `says_yes` reads a yes although the first word is not yes: "NO!", "There isn't", "Sure", an empty one."""
    return says_yes(answer) and first_word(answer) != "yes"


@dataclass(frozen=True, slots=True)
class Truth:
    """Split of a question, and whether yes is correct."""

    split: str
    label: bool


@dataclass(kw_only=True)
class PopeOptions(BenchmarkOptions):
    """Options of POPE.

    Attributes:
        questions: Files with `question_id`, `image`, `text` and `label` (yes or no), as JSONL or one list.
    """

    type: str = "pope"
    questions: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PopeBenchmark(Benchmark):
    """Question ids are SPLIT/QUESTION_ID, since each split counts from 1.

    `unreadable` is the share of answers for which `is_unreadable` holds: read as a yes that the model did not write.
    """

    Options = PopeOptions
    max_new_tokens: ClassVar[int] = 128
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"unreadable"})

    truth: dict[str, Truth]

    @classmethod
    def read(cls, options: PopeOptions) -> PopeBenchmark:
        if not options.questions:
            raise ValueError(f"benchmark {options.name or options.type!r}: option 'questions' is empty; list files")
        truth: dict[str, Truth] = {}
        questions = []
        for name in options.questions:
            for question, expected in read_questions(Path(name), options):
                questions.append(question)
                truth[question.id] = expected
        unique_ids(questions, ", ".join(options.questions))
        return cls(options=options, questions=tuple(questions), files=tuple(options.questions), truth=truth)

    def score(self, answers: Sequence[str]) -> Scores:
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            truth, yes = self.truth[question.id], says_yes(answer)
            values = (1, yes == truth.label, yes and truth.label, yes, truth.label)
            counts = {f"{truth.split}/{count}": float(value) for count, value in zip(_COUNTS, values, strict=True)}
            rows.append((question.resampled, {**counts, "unreadable": float(is_unreadable(answer))}))
            items.append(
                question.item(
                    answer,
                    split=truth.split,
                    label=_yes_no(truth.label),
                    read_as=_yes_no(yes),
                    unreadable=is_unreadable(answer),
                )
            )
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        splits = [name.removesuffix("/questions") for name in sums if name.endswith("/questions")]
        counts = {split: [sums[f"{split}/{count}"] for count in _COUNTS] for split in splits}
        micro = [sum(columns, np.zeros(())) for columns in zip(*counts.values(), strict=True)]
        by_split = {split: yes_no_metrics(*counts[split]) for split in splits}
        macro = {name: np.mean([by_split[split][name] for split in splits], axis=0) for name in by_split[splits[0]]}
        nested = {**by_split, "macro": macro, "micro": yes_no_metrics(*micro)}
        return {
            **{name: macro[name] for name in HEADLINE},
            "unreadable": ratio(sums["unreadable"], micro[0]),
            **{f"{group}/{name}": value for group, values in nested.items() for name, value in values.items()},
        }

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """JSONL of `question` and `answer`, as the official script reads it; `split` tells its files apart."""
        pairs = zip(self.questions, answers, strict=True)
        entries = [{"question": q.text, "answer": answer, "split": self.truth[q.id].split} for q, answer in pairs]
        return ".jsonl", "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)


def read_questions(path: Path, options: BenchmarkOptions) -> list[tuple[Question, Truth]]:
    """Reads one file.

    The split is the field `split` or `category`, else the word random, popular or adversarial in the file name, else
    the file name.

    Raises:
        ValueError: A question is invalid, or there is none; names file, line, field and fix.
    """
    of_name = next((split for split in SPLITS if split in path.name), path.stem)
    found = []
    for record in read_records(path):
        entry, where = record.value, record.where
        label = entry.get("label")
        if not isinstance(label, str) or label.strip().lower() not in _LABELS:
            raise ValueError(f"{where}: field 'label' is {label!r}; it must be yes or no (use the file with labels)")
        split = entry.get("split", entry.get("category", of_name))
        if not isinstance(split, str) or not split or split in ("macro", "micro"):
            raise ValueError(f"{where}: the split is {split!r}; it must be text such as random, not macro or micro")
        question = Question(
            id=f"{split}/{id_field(entry, 'question_id', where)}",
            image=text_field(entry, "image", where),
            text=options.asked(text_field(entry, "text", where)),
            labels=YES_NO,
        )
        found.append((question, Truth(split, _LABELS[label.strip().lower()])))
    if not found:
        raise ValueError(f"{path}: the file contains no question")
    return found


def yes_no_metrics(
    questions: np.ndarray, correct: np.ndarray, true_yes: np.ndarray, answered_yes: np.ndarray, labelled_yes: np.ndarray
) -> dict[str, np.ndarray]:
    """Fractions in [0, 1]; `yes_ratio` is the fraction of *answers* that are yes, regardless of the labels."""
    return {
        "accuracy": ratio(correct, questions),
        "precision": ratio(true_yes, answered_yes),
        "recall": ratio(true_yes, labelled_yes),
        "f1": ratio(2 * true_yes, answered_yes + labelled_yes),
        "yes_ratio": ratio(answered_yes, questions),
    }


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"
