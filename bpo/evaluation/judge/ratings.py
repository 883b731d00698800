"""Judges that rate: MMHal-Bench, MM-Vet, LLaVA-Bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import Question, Sums, ratio
from bpo.evaluation.benchmarks.judged import LlavaBenchBenchmark, MMHalBenchmark, MMVetBenchmark, read_mapping
from bpo.evaluation.files import id_field, text_field
from bpo.evaluation.judge.rule import RuleByAnswer, grouped
from bpo.formats.jsonfiles import read_records

_MMHAL_TYPES = 8


class MMHalRule(RuleByAnswer):
    """The reply has `rating: N`, N = 0..6; below 3 the answer is hallucinated.

    As in the official script, a reply with no rating or with two different ones counts as 0.
    """

    placeholders = (*RuleByAnswer.placeholders, "image_content")
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"hallucination_rate"})

    def __init__(self, benchmark: MMHalBenchmark):
        self.records = benchmark.records

    def fields(self, question: Question, answer: str) -> dict[str, str]:
        record, where = self.records[question.id], f"record {question.id}"
        content = record.get("image_content")
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"{where}: field 'image_content' is {content!r}; it must be a list of texts")
        return {
            "question": question.text,
            "answer": answer,
            "reference": text_field(record, "gt_answer", where),
            "image_content": ", ".join(content),
        }

    def read(self, question: Question, answer: str, reply: str) -> int | None:
        found = [rating for rating in range(7) if f"rating: {rating}" in reply.lower()]
        return found[0] if len(found) == 1 else None

    def counts(self, question: Question, answer: str, verdict: int | None) -> Mapping[str, float]:
        rating = verdict or 0
        # Named by the file where it can be; the script knows types only by position.
        kind = self.records[question.id].get("question_type") or str(int(question.id) % _MMHAL_TYPES)
        counts = {"ratings": 1.0, "rating": float(rating), "hallucinated": float(rating < 3)}
        return {**counts, f"ratings/{kind}": 1.0, f"rating/{kind}": float(rating)}

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {
            "score": ratio(sums["rating"], sums["ratings"]),
            "hallucination_rate": ratio(sums["hallucinated"], sums["ratings"]),
            **{
                f"score/{kind}": ratio(sums[f"rating/{kind}"], sums[f"ratings/{kind}"])
                for kind in grouped(sums, "ratings/")
            },
        }


class MMVetRule(RuleByAnswer):
    """The first word of the reply is a score from 0.0 to 1.0; metrics are 100 times the mean.

    The official script asks again at higher temperatures and counts 0 after five unreadable replies; here an unreadable
    reply counts as 0 at once.
    """

    def __init__(self, benchmark: MMVetBenchmark):
        self.records = benchmark.records

    def fields(self, question: Question, answer: str) -> dict[str, str]:
        reference = text_field(self.records[question.id], "answer", f"question {question.id}")
        spaced = reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return {"question": question.text, "answer": answer, "reference": spaced}

    def read(self, question: Question, answer: str, reply: str) -> float | None:
        try:
            score = float((reply.split() or [""])[0])
        except ValueError:
            return None
        return score if 0 <= score <= 1 else None

    def counts(self, question: Question, answer: str, verdict: float | None) -> Mapping[str, float]:
        abilities = self.records[question.id].get("capability")
        if not isinstance(abilities, list) or not abilities:
            raise ValueError(f"question {question.id}: field 'capability' is {abilities!r}; it must be a list")
        names = ["", *(f"/{name}" for name in sorted({*abilities}))]
        return {f"{key}{name}": value for name in names for key, value in (("points", verdict or 0.0), ("scores", 1.0))}

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        names = ["", *(f"/{name}" for name in grouped(sums, "scores/"))]
        return {f"score{name}": 100 * ratio(sums[f"points{name}"], sums[f"scores{name}"]) for name in names}


class LlavaBenchRule(RuleByAnswer):
    """The first line of the reply has two scores, of reference and answer: 100 * sum(answer) / sum(reference).

    An unreadable reply is left out; the official script adds -1 to both sums.
    """

    placeholders = (*RuleByAnswer.placeholders, "context", "rule", "role")

    def __init__(self, benchmark: LlavaBenchBenchmark):
        options, self.records = benchmark.options, benchmark.records
        self.references = _by_key(options.path("references"), "question_id")
        self.contexts = _by_key(options.path("context"), "image")
        self.rules = read_mapping(options.path("rules"))
        for question in benchmark.questions:
            self.fields(question, "")

    def fields(self, question: Question, answer: str) -> dict[str, str]:
        where, category = f"question {question.id}", f"llava_bench_{self.records[question.id]['category']}"
        for table, key, name in (
            (self.references, question.id, "references"),
            (self.contexts, question.image, "context"),
            (self.rules, category, "rules"),
        ):
            if key not in table:
                raise ValueError(f"{where}: {key!r} is not in the file of option {name!r}; use the benchmark's")
        caption = self.contexts[question.image].get("caption")
        return {
            "question": question.text,
            "answer": answer,
            "reference": text_field(self.references[question.id], "text", where),
            "context": "\n".join(caption) if isinstance(caption, list) else str(caption),
            "rule": text_field(self.rules[category], "prompt", category),
            "role": text_field(self.rules[category], "role", category),
        }

    def read(self, question: Question, answer: str, reply: str) -> list[float] | None:
        words = reply.strip().split("\n")[0].replace(",", " ").split()
        try:
            scores = [float(word) for word in words]
        except ValueError:
            return None
        return scores if len(scores) == 2 and np.isfinite(scores).all() else None

    def counts(self, question: Question, answer: str, verdict: list[float] | None) -> Mapping[str, float]:
        reference, score = verdict or (0.0, 0.0)
        category = self.records[question.id]["category"]
        names = ("", f"/{category}")
        return {f"{key}{name}": value for name in names for key, value in (("reference", reference), ("answer", score))}

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        names = ["", *(f"/{name}" for name in grouped(sums, "reference/"))]
        return {f"score{name}": 100 * ratio(sums[f"answer{name}"], sums[f"reference{name}"]) for name in names}


def _by_key(path: Path, key: str) -> dict[str, dict[str, Any]]:
    return {str(id_field(record.value, key, record.where)): record.value for record in read_records(path)}
