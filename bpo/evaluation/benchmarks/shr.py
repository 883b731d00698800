"""SHR: share of the sentences of descriptions that a judge calls hallucinated (arXiv 2311.16839), on Visual Genome.

The part of it that needs no judge is the benchmark `repetition`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bpo.evaluation.benchmark import Question
from bpo.evaluation.benchmarks.judged import JudgedBenchmark, JudgedOptions, answers_by_id
from bpo.evaluation.files import id_field, text_field
from bpo.formats.jsonfiles import read_records

PROMPT = "Describe this image in detail."


@dataclass(kw_only=True)
class ShrOptions(JudgedOptions):
    """Options of SHR.

    Attributes:
        questions: val_images_final.json: records with image_id.
        visual_genome: Folder with image_data.json and, for judging, region_descriptions.json of Visual Genome; empty
            uses the folder of `questions`.
        facts: For judging: shr_factual_part1.jsonl and shr_factual_part2.jsonl, image id -> list of sentences.
    """

    type: str = "shr"
    visual_genome: str = ""
    facts: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder of Visual Genome's files."""
        return Path(self.visual_genome) if self.visual_genome else self.path("questions").parent


@dataclass(frozen=True, kw_only=True)
class ShrBenchmark(JudgedBenchmark):
    """Question ids are image ids; images are the last two parts of their URL, such as VG_100K/2.jpg."""

    Options = ShrOptions
    max_new_tokens: ClassVar[int] = 512

    @classmethod
    def _files(cls, options: Any) -> tuple[str, ...]:
        return options.questions, str(options.folder / "image_data.json")

    @classmethod
    def _entries(cls, options: Any) -> Iterable[tuple[str, dict[str, Any], str]]:
        images = options.folder / "image_data.json"
        known = {str(id_field(image.value, "image_id", image.where)): image for image in read_records(images)}
        for record in read_records(options.path("questions")):
            key = str(id_field(record.value, "image_id", record.where))
            if key not in known:
                raise ValueError(f"{record.where}: image_id {key} is not in {images}; use the complete file")
            yield key, known[key].value, known[key].where

    @classmethod
    def _question(cls, options: Any, key: str, record: dict[str, Any], where: str) -> Question:
        image = "/".join(text_field(record, "url", where).split("/")[-2:])
        return Question(id=key, image=image, text=options.asked(options.prompt or PROMPT))

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """A JSON object of descriptions by image id."""
        return ".json", answers_by_id(self.questions, answers)
