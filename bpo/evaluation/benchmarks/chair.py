"""CHAIR: objects that a description names but the image lacks (arXiv 1809.02156).

    chair_i = hallucinated mentions / all mentions                 (repeats count)
    chair_s = descriptions with a hallucinated mention / descriptions
    recall  = distinct present objects named / distinct present objects

An object is present if an instance annotation or a ground-truth caption of the image names it. All three sum over the
data set before dividing. A ratio with denominator 0 is 0: descriptions that name no object have chair_i 0 and recall 0,
so always report both. `bpo.formats.lexicon` finds mentions, and lists where it differs from the released code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.files import CocoImages, read_coco
from bpo.formats.lexicon import Mention

logger = logging.getLogger(__name__)

PROMPT = "Please describe this image in detail."


@dataclass(frozen=True, slots=True)
class Description:
    """The objects that a text names, and those in its image.

    Attributes:
        present: Objects in the image.
        mentions: All mentions, in order.
    """

    present: frozenset[str]
    mentions: tuple[Mention, ...]

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        return tuple(mention for mention in self.mentions if mention.object not in self.present)

    @property
    def named(self) -> frozenset[str]:
        """Present objects that the description names."""
        return self.present & {mention.object for mention in self.mentions}

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(sorted(self.present - self.named))

    def counts(self) -> dict[str, float]:
        return {
            "descriptions": 1,
            "with_hallucination": bool(self.hallucinated),
            "mentions": len(self.mentions),
            "hallucinated": len(self.hallucinated),
            "present": len(self.present),
            "named": len(self.named),
        }


@dataclass(kw_only=True)
class ChairOptions(BenchmarkOptions):
    """Options of CHAIR.

    Attributes:
        instances: COCO instances JSON (`images`, `annotations`, `categories`).
        captions: COCO captions JSON; objects mentioned in captions also count as present.
        synonyms: One object per line, its canonical name followed by synonyms; empty uses the category names.
    """

    type: str = "chair"
    instances: str = ""
    captions: str = ""
    synonyms: str = ""


@dataclass(frozen=True, kw_only=True)
class ChairBenchmark(Benchmark):
    """Asks for a description of each image; question ids are image ids as text."""

    Options = ChairOptions
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"chair_i", "chair_s"})

    coco: CocoImages

    @classmethod
    def read(cls, options: ChairOptions) -> ChairBenchmark:
        path = options.path("instances")
        captions, synonyms = (options.path(n) if getattr(options, n) else None for n in ("captions", "synonyms"))
        coco = read_coco(path, captions, synonyms)
        text = options.asked(options.prompt or PROMPT)
        return cls(
            options=options,
            questions=tuple(Question(id=str(i), image=file, text=text) for i, file in coco.file_of_image.items()),
            files=tuple(str(file) for file in (path, captions, synonyms) if file),
            coco=coco,
        )

    def score(self, answers: Sequence[str]) -> Scores:
        present = {str(image_id): objects for image_id, objects in self.coco.present_of_image.items()}
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            found = Description(present[question.id], self.coco.lexicon.mentions(answer))
            rows.append((question.resampled, found.counts()))
            items.append(
                question.item(
                    answer,
                    present=sorted(found.present),
                    mentions=[asdict(mention) for mention in found.mentions],
                    hallucinated=[mention.object for mention in found.hallucinated],
                    missing=list(found.missing),
                )
            )
        if items and not any(item["mentions"] for item in items):
            logger.warning("no description names any object, so chair_i is 0 without meaning; read the answers")
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {
            "chair_i": ratio(sums["hallucinated"], sums["mentions"]),
            "chair_s": ratio(sums["with_hallucination"], sums["descriptions"]),
            "recall": ratio(sums["named"], sums["present"]),
        }

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """JSONL of `image_id` (as in the instances) and `caption`, as the public copies of the scorer read it."""
        image_ids = {str(image_id): image_id for image_id in self.coco.file_of_image}
        lines = [
            json.dumps({"image_id": image_ids[question.id], "caption": answer}, ensure_ascii=False)
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        return ".jsonl", "".join(f"{line}\n" for line in lines)
