"""Object HalBench (arXiv 2312.00849) by its rule path, without a language model.

    chair_s_refine = answers with a hallucinated object / answers that name an object
    chair_i, chair_s, recall: as in CHAIR, which also says when an object is present

The published numbers take objects from answers with gpt-3.5-turbo; without it the official script reads words as CHAIR
does, and so does this benchmark, with `bpo.formats.lexicon`. The two are not comparable, as the result's name says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import Question, Scores, Sums, ratio
from bpo.evaluation.benchmarks.chair import ChairBenchmark, ChairOptions
from bpo.evaluation.files import id_field, read_coco, text_field, unique_ids
from bpo.formats.jsonfiles import read_records


@dataclass(kw_only=True)
class ObjectHalOptions(ChairOptions):
    """Options of Object HalBench; `instances`, `captions` and `synonyms` as for CHAIR.

    Attributes:
        questions: JSONL with `image_id` and `question`, such as obj_halbench_300_with_image.jsonl; its own images
            are not read.
    """

    type: str = "objhal"
    questions: str = ""


@dataclass(frozen=True, kw_only=True)
class ObjectHalBenchmark(ChairBenchmark):
    """One question per image; question ids are image ids as text."""

    Options = ObjectHalOptions
    lower_is_better: ClassVar[frozenset[str]] = ChairBenchmark.lower_is_better | {"chair_s_refine"}

    asked: Mapping[str, str]

    @classmethod
    def read(cls, options: Any) -> ObjectHalBenchmark:
        path, instances = options.path("questions"), options.path("instances")
        captions, synonyms = (options.path(n) if getattr(options, n) else None for n in ("captions", "synonyms"))
        coco = read_coco(instances, captions, synonyms)
        files = {str(image_id): file for image_id, file in coco.file_of_image.items()}
        questions, asked = [], {}
        for record in read_records(path):
            image_id = str(id_field(record.value, "image_id", record.where))
            if image_id not in files:
                raise ValueError(
                    f"{record.where}: image_id {image_id} is not in {instances}; use the split that has it"
                )
            text = options.prompt or text_field(record.value, "question", record.where)
            questions.append(Question(id=image_id, image=files[image_id], text=options.asked(text)))
            asked[image_id] = text
        if not questions:
            raise ValueError(f"{path}: the file contains no question")
        unique_ids(questions, str(path))
        read = tuple(str(file) for file in (path, instances, captions, synonyms) if file)
        return cls(options=options, questions=tuple(questions), files=read, label="rule path", coco=coco, asked=asked)

    def score(self, answers: Sequence[str]) -> Scores:
        scores = super().score(answers)
        pairs = zip(scores.rows, scores.items, strict=True)
        naming = [(unit, {"naming": float(bool(item["mentions"]))}) for (unit, _), item in pairs]
        return Scores((*scores.rows, *naming), scores.items)

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {"chair_s_refine": ratio(sums["with_hallucination"], sums["naming"]), **ChairBenchmark.metrics(sums)}

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """JSONL of `question`, `answer` and `image_id`, as the official script reads it."""
        image_ids = {str(image_id): image_id for image_id in self.coco.file_of_image}
        entries = [
            {"question": self.asked[question.id], "answer": answer, "image_id": image_ids[question.id]}
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        return ".jsonl", "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
