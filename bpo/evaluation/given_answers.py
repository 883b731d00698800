"""Answers that something else gave, read from a file and joined to the questions of a suite.

Three forms: records with an id and a text, as JSONL or a JSON list; a results file of `bpo evaluate`; the official
answer file of a benchmark, which may name a question otherwise than `Question.id`: by `image_id`, by the key of an
object, or only by its place in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.suite import Suite
from bpo.formats.jsonfiles import BOM, parse_json

IDS = ("id", "question_id", "image_id")
TEXTS = ("answer", "text", "response", "caption", "model_prediction", "model_answer", "prediction")


@dataclass(frozen=True, slots=True)
class _Given:
    """A record: where it is, for messages; its answer; its other fields."""

    where: str
    text: str
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        return next((str(self.fields[name]) for name in IDS if name in self.fields), "")


def read_answers(path: Path, suite: Suite, *, skip_others: bool = False) -> list[list[str]]:
    """For each benchmark of the suite the answers to its questions, in order.

    Records may name their benchmark in the field `benchmark`; without it, an answer belongs to the benchmark that has
    a question with its id.

    Args:
        skip_others: Leave out records that name a benchmark which is not in the suite, instead of refusing them.

    Raises:
        ValueError: A question has no answer or several, an answer has no question or questions of several benchmarks,
            or a record lacks its text; names file, ids and fix.
    """
    try:
        given = list(_records(path.read_bytes(), str(path)))
    except OSError as error:
        raise ValueError(f"evaluation.answers: {path} cannot be read ({error.strerror}); check the path") from error
    places = [_Places.of(benchmark) for benchmark in suite.benchmarks]
    shares: list[list[_Given]] = [[] for _ in places]
    names = {name for place in places for name in place.names}
    for record in given:
        if skip_others and record.fields.get("benchmark", next(iter(names))) not in names:
            continue
        shares[_owner(record, places)].append(record)
    return [place.joined(share, path) for place, share in zip(places, shares, strict=True)]


def _records(content: bytes, name: str) -> Iterator[_Given]:
    content = content.removeprefix(BOM)
    try:
        tree = json.loads(content)
    except ValueError:
        lines = [(f"{name}, line {n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        yield from (_given(parse_json(line, where), where) for where, line in lines)
        return
    if isinstance(tree, dict) and isinstance(tree.get("benchmarks"), list):
        for result in tree["benchmarks"]:
            benchmark = result["settings"]["options"]["name"] or result["type"]
            for item in result["items"]:
                fields = {"benchmark": benchmark, "id": item["id"]}
                yield _Given(f"{name}, {benchmark}, {item['id']!r}", item["answer"], fields)
    elif isinstance(tree, dict) and not {*IDS, *TEXTS} & set(tree):
        for key, text in tree.items():
            yield _given({"id": key, "answer": text}, f"{name}, {key!r}")
    else:
        for number, record in enumerate(tree if isinstance(tree, list) else [tree]):
            yield _given(record, f"{name}, record {number}")


def _given(record: Any, where: str) -> _Given:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is {record!r}; write an object with an id and an answer")
    found = [name for name in TEXTS if isinstance(record.get(name), str)]
    # Where another field is a text too, `text` is the question.
    names = [name for name in found if name != "text"] or found
    if len(names) != 1:
        has = f"the answers {', '.join(names)}" if names else f"no text among {', '.join(TEXTS)}"
        raise ValueError(f"{where}: the record has {has}; give it one, such as `answer`")
    return _Given(where, record[names[0]], {name: value for name, value in record.items() if name != names[0]})


@dataclass(frozen=True, slots=True)
class _Places:
    """How records name the questions of a benchmark.

    Attributes:
        names: The benchmark's names, with and without its label.
        ids: The questions' ids.
        by_id: Id, or id in the official answer file -> number of the question.
        official: Records of the official answer file, in order; their answers are the numbers of the questions.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...]
    by_id: Mapping[str, int]
    official: Sequence[_Given]

    @classmethod
    def of(cls, benchmark: Benchmark) -> _Places:
        ids = tuple(question.id for question in benchmark.questions)
        suffix, content = benchmark.answer_file([str(n) for n in range(len(ids))]) or ("", "")
        official = list(_records(content.encode(), "")) if suffix in (".json", ".jsonl") else []
        by_id = {record.id: int(record.text) for record in official if record.id}
        if len(by_id) < len(official):  # such as ids that are unique only within a part
            by_id = {}
        names = (benchmark.name, benchmark.options.name or benchmark.options.type)
        return cls(names, ids, by_id | {id: n for n, id in enumerate(ids)}, official)

    def joined(self, given: Sequence[_Given], path: Path) -> list[str]:
        """The answers in the order of the questions."""
        if self.official and not any(record.id in self.by_id for record in given):
            pairs = self._by_place(given, path)
        elif unknown := [record for record in given if record.id not in self.by_id]:
            raise ValueError(
                f"{unknown[0].where}: {self.names[0]} has no question {unknown[0].id!r} ({len(unknown)} such answers); "
                f"its ids are like {self.ids[0]!r}"
            )
        else:
            pairs = [(self.by_id[record.id], record) for record in given]
        answers: dict[int, str] = {}
        for number, record in pairs:
            if number in answers:
                raise ValueError(f"{record.where}: question {self.ids[number]!r} has a second answer; keep one")
            answers[number] = record.text
        if missing := [id for number, id in enumerate(self.ids) if number not in answers]:
            raise ValueError(
                f"{path}: {len(missing)} of {len(self.ids)} questions of {self.names[0]} have no answer, such as "
                f"{', '.join(map(repr, missing[:3]))}; add them, or restrict the images of the suite"
            )
        return [answers[number] for number in range(len(self.ids))]

    def _by_place(self, given: Sequence[_Given], path: Path) -> list[tuple[int, _Given]]:
        """Joins records without ids to those of the official answer file, in order, after comparing their fields."""
        if len(given) != len(self.official):
            raise ValueError(
                f"{path}: {len(given)} answers without a known id for {len(self.official)} questions of "
                f"{self.names[0]}; add the field `id`, like {self.ids[0]!r}"
            )
        for record, expected in zip(given, self.official, strict=True):
            for name in record.fields.keys() & expected.fields.keys():
                if record.fields[name] != expected.fields[name]:
                    raise ValueError(
                        f"{record.where}: {name} is {record.fields[name]!r}, but the question at this place has "
                        f"{expected.fields[name]!r}; keep the order of the questions, or add the field `id`"
                    )
        return [(int(expected.text), record) for record, expected in zip(given, self.official, strict=True)]


def _owner(record: _Given, places: Sequence[_Places]) -> int:
    """The number of the benchmark that an answer belongs to."""
    named = record.fields.get("benchmark")
    if named is None and len(places) == 1:
        return 0
    found = [
        n for n, place in enumerate(places) if (record.id in place.by_id if named is None else named in place.names)
    ]
    if len(found) != 1:
        what = f"the benchmark {named!r}" if named is not None else f"the id {record.id!r}"
        raise ValueError(
            f"{record.where}: {what} is {'of several benchmarks' if found else 'not in the suite'}; the field "
            f"`benchmark` must be one of {', '.join(place.names[1] for place in places)}"
        )
    return found[0]
