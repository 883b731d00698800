"""Judges that read the answers of benchmarks which have a rule for it: HallusionBench, Object HalBench.

Scores and metrics are those of `bpo.evaluation.benchmarks`; only the reading of the answers differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import Question, Sums
from bpo.evaluation.benchmarks.chair import Description
from bpo.evaluation.benchmarks.hallusion import HallusionBenchmark
from bpo.evaluation.benchmarks.objhal import ObjectHalBenchmark
from bpo.evaluation.files import text_field
from bpo.evaluation.judge.rule import Rule, RuleByAnswer
from bpo.formats.lexicon import Mention, singular_forms

# Official: no object is looked for in answers of at most this many words.
_SHORT_WORDS = 3
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL)


class HallusionRule(Rule):
    """The reply says correct, incorrect or unclear; as in the official script, anything else counts as unclear."""

    lower_is_better: ClassVar[frozenset[str]] = frozenset({"unclear"})

    def __init__(self, benchmark: HallusionBenchmark):
        self.benchmark = benchmark

    def fields(self, question: Question, answer: str) -> dict[str, str]:
        reference = text_field(self.benchmark.records[question.id], "gt_answer_details", f"question {question.id}")
        return {"question": question.text, "answer": answer, "reference": reference}

    def read(self, question: Question, answer: str, reply: str) -> str | None:
        # "incorrect" first: it contains "correct".
        return next((word for word in ("incorrect", "correct", "unclear") if word in reply.lower()), None)

    def rows(
        self, questions: Sequence[Question], answers: Sequence[str], verdicts: Sequence[str | None]
    ) -> list[tuple[str, Mapping[str, float]]]:
        """Scores the label where the judge says correct, the other word where it says incorrect, else no word."""
        read = []
        for question, verdict in zip(questions, verdicts, strict=True):
            is_yes = str(self.benchmark.records[question.id]["gt_answer"]) == "1"
            words = {"correct": ("no", "yes")[is_yes], "incorrect": ("yes", "no")[is_yes]}
            read.append(words.get(verdict or "", ""))
        return list(self.benchmark.score(read).rows)

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        found = HallusionBenchmark.metrics(sums)
        return {("unclear" if name == "unreadable" else name): value for name, value in found.items()}


class ObjectHalRule(RuleByAnswer):
    """The reply is a JSON list of the objects in the answer, in a code block or on its last line with a bracket.

    Each name in the list is looked up in the lexicon, and counts once per answer, as in the official script, which
    finds nouns with a tagger. An unreadable reply is left out; the official script repeats the request.
    """

    placeholders = ("question", "answer")
    lower_is_better: ClassVar[frozenset[str]] = ObjectHalBenchmark.lower_is_better

    def __init__(self, benchmark: ObjectHalBenchmark):
        self.asked, self.lexicon = benchmark.asked, benchmark.coco.lexicon
        self.present = {str(image_id): objects for image_id, objects in benchmark.coco.present_of_image.items()}

    def fields(self, question: Question, answer: str) -> dict[str, str]:
        return {"question": self.asked[question.id], "answer": answer}

    def settled(self, answer: str) -> bool:
        return len(answer.split()) <= _SHORT_WORDS

    def read(self, question: Question, answer: str, reply: str) -> list[str] | None:
        if self.settled(answer):
            return []
        fenced = _FENCED.findall(reply)
        lines = [line.strip() for line in reply.split("\n") if "[" in line]
        try:
            names = json.loads((fenced or lines or [""])[-1])
        except ValueError:
            return None
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def counts(self, question: Question, answer: str, verdict: list[str] | None) -> Mapping[str, float]:
        if verdict is None:
            return {}
        mentions: dict[Any, Mention] = {}
        for name in verdict:
            for mention in self.lexicon.mentions(name):
                *words, last = name[mention.start : mention.end].lower().split()
                mentions.setdefault((*words, *(singular_forms(last) or (last,))[:1]), mention)
        found = Description(self.present[question.id], tuple(mentions.values()))
        return {**found.counts(), "naming": float(bool(mentions))}

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return ObjectHalBenchmark.metrics(sums)
