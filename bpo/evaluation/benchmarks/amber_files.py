"""Questions and annotations of AMBER (arXiv 2311.07397), from the folder `data` of its repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.evaluation.benchmark import BenchmarkOptions, Question
from bpo.evaluation.files import id_field, text_field, unique_ids
from bpo.formats.jsonfiles import parse_json, read_records

# The official denominators start at this (data/metrics.txt), so that none is 0.
START = 0.001


@dataclass(kw_only=True)
class AmberOptions(BenchmarkOptions):
    """Options of both parts of AMBER.

    Attributes:
        data: Folder with AMBER's data: `annotations.json`, `relation.json`, `safe_words.txt`, `query/`.
    """

    data: str = ""


@dataclass(frozen=True, slots=True)
class Annotated:
    """A question, its annotation, and where the annotation was read."""

    question: Question
    annotation: dict[str, Any]
    where: str


def read_annotated(options: AmberOptions, part: str, labels: tuple[str, ...] = ()) -> tuple[list[Annotated], list[str]]:
    """Reads the questions of one part (`generative` or `discriminative`) and their annotations.

    Returns:
        The questions in the order of the file, and the paths that were read.

    Raises:
        ValueError: A file or a field is missing, or a question has no annotation; names file, record and fix.
    """
    folder = options.path("data")
    queries, annotations = folder / "query" / f"query_{part}.json", folder / "annotations.json"
    annotation_of_id = {id_field(r.value, "id", r.where): r for r in read_records(annotations)}
    found = []
    for record in read_records(queries):
        entry, where = record.value, record.where
        number = id_field(entry, "id", where)
        if number not in annotation_of_id or isinstance(number, str):
            raise ValueError(f"{where}: id {number!r} is not in {annotations}; use the files of one version of AMBER")
        text = options.prompt or text_field(entry, "query", where)
        image = text_field(entry, "image", where)
        question = Question(id=str(number), image=image, text=options.asked(text), labels=labels)
        annotation = annotation_of_id[number]
        found.append(Annotated(question, annotation.value, annotation.where))
    if not found:
        raise ValueError(f"{queries}: the file contains no question")
    unique_ids([each.question for each in found], str(queries))
    return found, [str(queries), str(annotations)]


def read_relations(path: Path) -> dict[str, list[str]]:
    """Reads `relation.json`: object -> words that may stand for it.

    Raises:
        ValueError: It is something else; names the file.
    """
    try:
        tree = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check option 'data'") from error
    if not isinstance(tree, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in tree.values()
    ):
        raise ValueError(f"{path}: not an object of word lists; use AMBER's relation.json")
    return tree


def official_answers(questions: Sequence[Question], answers: Sequence[str]) -> tuple[str, str]:
    """The JSON list of `id` and `response` that the official `inference.py` reads."""
    pairs = zip(questions, answers, strict=True)
    entries = [{"id": int(question.id), "response": answer} for question, answer in pairs]
    return ".json", json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
