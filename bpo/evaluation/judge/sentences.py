"""Judging of descriptions sentence by sentence: SHR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import Question, Sums, ratio
from bpo.evaluation.benchmarks.shr import ShrBenchmark, ShrOptions
from bpo.evaluation.judge.rule import RuleByAnswer
from bpo.formats.jsonfiles import read_records

HALLUCINATION = "hallucination"
_CLASSES = (HALLUCINATION, "correct", "cannot judge")


def sentences_of(description: str) -> list[str]:
    """The parts between full stops; parts that occur within an earlier one are left out, as in the official script."""
    kept: list[str] = []
    for part in map(str.strip, description.split(".")):
        if part and not any(part in earlier for earlier in kept):
            kept.append(part)
    return kept


class ShrRule(RuleByAnswer):
    """After a line with "Judgement:", the reply has one line per sentence: a number, a class, a colon, a reason.

    Classes are hallucination, correct and cannot judge; ratios are over sentences with one of these. If the numbers of
    lines and sentences differ, all sentences of the description are left out, as in the official script.
    """

    placeholders = ("answer", "sentences", "regions", "facts")
    needed = ("answer", "sentences")
    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        {"hallucinated_sentences", "hallucinated_words", "hallucinated_sentences_per_image"}
    )

    def __init__(self, benchmark: ShrBenchmark):
        options: ShrOptions = benchmark.options
        wanted = {question.id for question in benchmark.questions}
        records = benchmark.records
        self.regions: dict[str, str] = {}
        path = options.folder / "region_descriptions.json"
        for record in read_records(path):
            try:
                regions = record.value["regions"]
                key = str(regions[0]["image_id"]) if regions else ""
                if key in wanted:
                    self.regions[key] = "".join(_region(region, records[key]) for region in regions if region["phrase"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"{record.where}: a region has another form ({error!r})") from error
        if missing := sorted(wanted - self.regions.keys()):
            raise ValueError(f"{path}: {len(missing)} images have no regions, such as {missing[0]}")
        self.facts = {key: text for name in options.facts for key, text in _facts(Path(name)).items()}

    def fields(self, question: Question, answer: str) -> dict[str, str]:
        numbered = enumerate(sentences_of(answer), 1)
        return {
            "answer": answer,
            "sentences": "".join(f"{number}. {sentence}\n" for number, sentence in numbered),
            "regions": self.regions[question.id],
            "facts": self.facts.get(question.id, ""),
        }

    def settled(self, answer: str) -> bool:
        return not sentences_of(answer)

    def read(self, question: Question, answer: str, reply: str) -> list[str] | None:
        sentences, lines = sentences_of(answer), [line for line in reply.split("\n") if line]
        start = next((number for number, line in enumerate(lines, 1) if "Judgement:" in line), len(lines))
        after_number = [line.partition(" ")[2].strip() for line in lines[start:]]
        classes = [text.split(":")[0].lower() for text in after_number if text]
        return classes if len(classes) == len(sentences) else None

    def counts(self, question: Question, answer: str, verdict: list[str] | None) -> Mapping[str, float]:
        counts = {"images": 1.0, "sentences": 0.0, "words": 0.0, "false_sentences": 0.0, "false_words": 0.0}
        for sentence, verdict_of in zip(sentences_of(answer), verdict or [], strict=False):
            if verdict_of in _CLASSES:
                words, is_false = len(sentence.split(" ")), verdict_of == HALLUCINATION
                counts["sentences"] += 1
                counts["words"] += words
                counts["false_sentences"] += is_false
                counts["false_words"] += words * is_false
        return counts

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {
            "hallucinated_sentences": ratio(sums["false_sentences"], sums["sentences"]),
            "hallucinated_words": ratio(sums["false_words"], sums["words"]),
            "hallucinated_sentences_per_image": ratio(sums["false_sentences"], sums["images"]),
        }


def _region(region: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """One line with a region's corners as fractions of the image, and its phrase."""
    left, top, width, height = region["x"], region["y"], image["width"], image["height"]
    right, bottom = left + region["width"], top + region["height"]
    corners = [round(part, 2) for part in (left / width, top / height, right / width, bottom / height)]
    return f"{corners}: {region['phrase']}\n"


def _facts(path: Path) -> dict[str, str]:
    """Facts by image id, one per line; each record of the file is {image id: [facts]}."""
    return {
        str(key): "".join(f"{fact}\n" for fact in facts)
        for record in read_records(path)
        for key, facts in record.value.items()
    }
