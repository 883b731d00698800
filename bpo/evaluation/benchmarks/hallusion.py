"""HallusionBench (arXiv 2310.14566) with answers read as yes or no, without a judge.

    a_acc = right answers / questions
    f_acc = figures all of whose questions are right / figures
    q_acc = questions right for each of their figures / questions

over everything and for VD (visual dependent) and VS (visual supplement). An answer is read as VLMEvalKit does without a
judge (`read_yes_no`), so numbers differ from those judged by GPT-4. The rest is the official `evaluation.py`: questions
without a figure (VS, figure 0) have no part in f_acc, and an answer to them that is neither yes nor no counts as right,
since there the model cannot know. VLMEvalKit's data have no such questions: `text_only: false` leaves them out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import YES_NO, Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.files import id_field, text_field, unique_ids
from bpo.formats.jsonfiles import read_records

CATEGORIES = ("VD", "VS")
_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
_KINDS = ("a", "f", "q")
_ANSWERS = {"1": "yes", "0": "no"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_MAX_FULL_STOPS = 32  # the published code passes re.UNICODE, which is 32, as the number of replacements


def read_yes_no(answer: str) -> str:
    """yes or no if exactly one of the two words occurs, else unknown.

    As in VLMEvalKit and VQA's evaluation: a punctuation mark is removed if it is next to a space anywhere or if a comma
    separates digits somewhere, otherwise it becomes a space; full stops that are not before a digit are removed.
    """
    text = words = answer.lower()
    has_number = re.search(r"\d,\d", text) is not None
    for mark in _MARKS:
        is_removed = has_number or f"{mark} " in text or f" {mark}" in text
        words = words.replace(mark, "" if is_removed else " ")
    found = {"yes", "no"} & set(re.sub(r"\.(?!\d)", "", words, count=_MAX_FULL_STOPS).split())
    return found.pop() if len(found) == 1 else "unknown"


@dataclass(kw_only=True)
class HallusionOptions(BenchmarkOptions):
    """Options of HallusionBench.

    Attributes:
        data: HallusionBench.json.
        text_only: Also ask the questions without a figure.
    """

    type: str = "hallusion"
    data: str = ""
    text_only: bool = True


@dataclass(frozen=True, kw_only=True)
class HallusionBenchmark(Benchmark):
    """Question ids are CATEGORY/SUBCATEGORY/SET/FIGURE/QUESTION; the unit is a set, within which questions depend."""

    Options = HallusionOptions
    max_new_tokens: ClassVar[int] = 128
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"unreadable"})

    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, options: HallusionOptions) -> HallusionBenchmark:
        path = options.path("data")
        questions, records = [], {}
        for record in read_records(path):
            entry, where = record.value, record.where
            category, *rest = (str(id_field(entry, key, where)) for key in _KEYS)
            if category not in CATEGORIES or str(entry.get("gt_answer")) not in _ANSWERS:
                raise ValueError(f"{where}: category must be VD or VS and gt_answer 0 or 1; use HallusionBench.json")
            has_figure = str(entry.get("visual_input")) != "0"
            if not has_figure and not options.text_only:
                continue
            question = Question(
                id="/".join((category, *rest)),
                image=text_field(entry, "filename", where).removeprefix("./") if has_figure else "",
                text=options.asked(text_field(entry, "question", where)),
                unit="/".join((category, *rest[:2])),
                labels=YES_NO,
            )
            questions.append(question)
            records[question.id] = entry
        if not questions:
            raise ValueError(f"{path}: the file contains no question")
        unique_ids(questions, str(path))
        return cls(options=options, questions=tuple(questions), files=(str(path),), records=records)

    def score(self, answers: Sequence[str]) -> Scores:
        rows: list[tuple[str, dict[str, float]]] = []
        items = []
        groups: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
        for question, answer in zip(self.questions, answers, strict=True):
            record = self.records[question.id]
            category, figure, number = (str(record[key]) for key in ("category", "figure_id", "question_id"))
            said, label = read_yes_no(answer), _ANSWERS[str(record["gt_answer"])]
            is_without_figure = category == "VS" and figure == "0"
            correct = said == label or (is_without_figure and said == "unknown")
            groups[question.unit, "a", question.id].append(correct)
            groups[question.unit, "q", number].append(correct)
            if not is_without_figure:
                groups[question.unit, "f", figure].append(correct)
            rows.append((question.unit, {"unreadable": float(said == "unknown")}))
            items.append(question.item(answer, label=label, read_as=said, correct=correct))
        for (unit, kind, _), corrects in groups.items():
            name = f"{unit[:2]}/{kind}"
            rows.append((unit, {f"{name}_total": 1.0, f"{name}_correct": float(all(corrects))}))
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for prefix, categories in (("", CATEGORIES), ("VD/", ("VD",)), ("VS/", ("VS",))):
            for kind in _KINDS:
                correct, total = (
                    sums.total(f"{category}/{kind}_{name}" for category in categories) for name in ("correct", "total")
                )
                found[f"{prefix}{kind}_acc"] = ratio(correct, total)
        return found | {"unreadable": ratio(sums["unreadable"], sums["VD/a_total"] + sums["VS/a_total"])}

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """The records with `model_prediction`, as the official `evaluation.py` reads them."""
        pairs = zip(self.questions, answers, strict=True)
        entries = [{**self.records[question.id], "model_prediction": answer} for question, answer in pairs]
        return ".json", json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
