"""Benchmarks whose answers a language model judges: MMHal-Bench, MM-Vet and LLaVA-Bench (in the wild).

Answering needs no judge: `answer_file` gives exactly the file that the official script reads, and `bpo judge` or that
script scores it. Without a judge, only the mean length of the answers is measured.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums
from bpo.evaluation.files import id_field, text_field, unique_ids
from bpo.formats.jsonfiles import parse_json, read_records

T = TypeVar("T", bound="JudgedBenchmark")


@dataclass(kw_only=True)
class JudgedOptions(BenchmarkOptions):
    """Options of a judged benchmark.

    Attributes:
        questions: The benchmark's question file.
    """

    questions: str = ""


@dataclass(frozen=True, kw_only=True)
class JudgedBenchmark(Benchmark):
    """Scores are empty: only a judge can tell.

    Attributes:
        records: Question id -> its record in the question file.
    """

    Options = JudgedOptions
    max_new_tokens: ClassVar[int] = 1024

    options: Any
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls: type[T], options: Any) -> T:
        found = [(cls._question(options, *entry), entry[1]) for entry in cls._entries(options)]
        if not found:
            raise ValueError(f"{options.questions}: the file contains no question")
        questions = tuple(question for question, _ in found)
        unique_ids(questions, options.questions)
        records = {question.id: record for question, record in found}
        return cls(options=options, questions=questions, files=cls._files(options), records=records)

    @classmethod
    def _files(cls, options: Any) -> tuple[str, ...]:
        return (options.questions,)

    @classmethod
    @abstractmethod
    def _entries(cls, options: Any) -> Iterable[tuple[str, dict[str, Any], str]]:
        """(question id, record, where) of each question."""

    @classmethod
    @abstractmethod
    def _question(cls, options: Any, key: str, record: dict[str, Any], where: str) -> Question:
        """The question of a record; raises ValueError if a field is missing."""

    def score(self, answers: Sequence[str]) -> Scores:
        return Scores((), tuple(q.item(answer) for q, answer in zip(self.questions, answers, strict=True)))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {}


@dataclass(kw_only=True)
class MMHalOptions(JudgedOptions):
    """Options of MMHal-Bench.

    Attributes:
        questions: response_template.json: 96 records with question, image_content, gt_answer and image_src.
    """

    type: str = "mmhal"


@dataclass(frozen=True, kw_only=True)
class MMHalBenchmark(JudgedBenchmark):
    """MMHal-Bench (arXiv 2309.14525). Ids are positions in the file: the type of a question is its position mod 8.

    The image is the field `image`, else the last part of the URL `image_src`.
    """

    Options = MMHalOptions

    @classmethod
    def _entries(cls, options: Any) -> Iterable[tuple[str, dict[str, Any], str]]:
        return ((str(record.index), record.value, record.where) for record in read_records(options.path("questions")))

    @classmethod
    def _question(cls, options: Any, key: str, record: dict[str, Any], where: str) -> Question:
        image = record.get("image") or text_field(record, "image_src", where).rsplit("/", 1)[-1]
        return Question(id=key, image=str(image), text=options.asked(text_field(record, "question", where)))

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """The records of the question file with `model_answer`."""
        pairs = zip(self.questions, answers, strict=True)
        records = [{**self.records[q.id], "model_answer": answer} for q, answer in pairs]
        return ".json", json.dumps(records, indent=2, ensure_ascii=False) + "\n"


@dataclass(kw_only=True)
class MMVetOptions(JudgedOptions):
    """Options of MM-Vet.

    Attributes:
        questions: mm-vet.json: id -> imagename, question, answer, capability.
    """

    type: str = "mmvet"


@dataclass(frozen=True, kw_only=True)
class MMVetBenchmark(JudgedBenchmark):
    """MM-Vet (arXiv 2308.02490); ids are the keys of the question file, such as v1_0."""

    Options = MMVetOptions

    @classmethod
    def _entries(cls, options: Any) -> Iterable[tuple[str, dict[str, Any], str]]:
        path = options.path("questions")
        return ((key, value, f"{path}, {key!r}") for key, value in read_mapping(path).items())

    @classmethod
    def _question(cls, options: Any, key: str, record: dict[str, Any], where: str) -> Question:
        text = options.asked(text_field(record, "question", where))
        return Question(id=key, image=text_field(record, "imagename", where), text=text)

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """A JSON object of answers by question id."""
        return ".json", answers_by_id(self.questions, answers)


@dataclass(kw_only=True)
class LlavaBenchOptions(JudgedOptions):
    """Options of LLaVA-Bench; the last three are needed only for judging.

    Attributes:
        questions: questions.jsonl: question_id, image, text, category.
        context: context.jsonl: image, caption.
        references: answers_gpt4.jsonl: question_id, text.
        rules: rule.json: llava_bench_CATEGORY -> prompt, role.
    """

    type: str = "llava_bench"
    context: str = ""
    references: str = ""
    rules: str = ""


@dataclass(frozen=True, kw_only=True)
class LlavaBenchBenchmark(JudgedBenchmark):
    """LLaVA-Bench in the wild (arXiv 2304.08485)."""

    Options = LlavaBenchOptions

    @classmethod
    def _entries(cls, options: Any) -> Iterable[tuple[str, dict[str, Any], str]]:
        for record in read_records(options.path("questions")):
            yield str(id_field(record.value, "question_id", record.where)), record.value, record.where

    @classmethod
    def _question(cls, options: Any, key: str, record: dict[str, Any], where: str) -> Question:
        text_field(record, "category", where)
        text = options.asked(text_field(record, "text", where))
        return Question(id=key, image=text_field(record, "image", where), text=text)

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """JSONL as LLaVA's `model_vqa.py` writes it; `answer_id` is a digest, so that a rerun writes an equal file."""
        lines = []
        for question, answer in zip(self.questions, answers, strict=True):
            digest = hashlib.sha256(f"{question.id}\0{answer}".encode("utf-8", "surrogatepass")).hexdigest()
            entry = {
                "question_id": self.records[question.id]["question_id"],
                "prompt": question.text,
                "text": answer,
                "answer_id": digest[:22],
                "model_id": "bpo",
                "metadata": {},
            }
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        return ".jsonl", "".join(lines)


def read_mapping(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a JSON object of objects.

    Raises:
        ValueError: The file is missing or has another form; names it.
    """
    try:
        tree = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise ValueError(f"{path}: expected a JSON object of objects by id")
    return tree


def answers_by_id(questions: Sequence[Question], answers: Sequence[str]) -> str:
    """A JSON object of answers by question id."""
    return json.dumps(
        {q.id: answer for q, answer in zip(questions, answers, strict=True)}, indent=4, ensure_ascii=False
    )
