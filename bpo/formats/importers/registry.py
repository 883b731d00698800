"""What files bpo understands: finds the schema by the fields of a record, or says what is missing of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bpo.formats.importers.containers import Container, UnknownFormat, open_container
from bpo.formats.importers.llava import annotation_from_llava
from bpo.formats.importers.preferences import PairRow, group_from_rlhf_v, group_from_sharegpt, group_from_trl
from bpo.formats.importers.tables import ANSWER_COLUMNS, IMAGE_COLUMNS, annotation_from_row
from bpo.formats.jsonfiles import Piece
from bpo.formats.problems import RecordError
from bpo.formats.schema import annotation_from_json, group_from_json, group_from_paper
from bpo.records import Annotation, PreferenceGroup

# What a record becomes; a text is the reason why it holds nothing to learn from.
Outcome = Annotation | PreferenceGroup | PairRow | str
PROBED_RECORDS = 100


@dataclass(frozen=True, slots=True)
class Schema:
    """The form of a record.

    Attributes:
        name: As `bpo convert --from` takes it.
        title: Whose form it is, and what it holds.
        gives: What its records become.
        needs: Fields that must be there, each a tuple of the names it may bear.
        adapt: (record, id, where) -> what it becomes; raises `RecordError`.
        containers: Kinds of files it comes in; empty: all.
        id_keys: Names of the id.
        unique_ids: An id is required and must not repeat; else a missing one is made from the position, and the second
            `x` becomes `x#2`.
    """

    name: str
    title: str
    gives: Literal["annotations", "groups"]
    needs: tuple[tuple[str, ...], ...]
    adapt: Callable[[Mapping[str, Any], str, str], Outcome]
    containers: frozenset[str] = frozenset()
    id_keys: tuple[str, ...] = ("id",)
    unique_ids: bool = False

    def missing(self, record: Mapping[str, Any], kind: str) -> list[str]:
        """What of this schema the record lacks."""
        if self.containers and kind not in self.containers:
            return [f"another kind of file ({', '.join(sorted(self.containers))})"]
        return [" or ".join(repr(n) for n in names) for names in self.needs if not any(n in record for n in names)]


_TURNS = ("conversations", "messages")
# In the order in which they are tried: the more particular first.
SCHEMAS: tuple[Schema, ...] = (
    Schema(
        name="groups",
        title="bpo's groups, one a line: id, images, prompt, completions",
        gives="groups",
        needs=(("completions",),),
        adapt=lambda value, record_id, where: group_from_json(value, where),
        containers=frozenset({"jsonl"}),
        unique_ids=True,
    ),
    Schema("paper", "the paper's release: prompt, image, completions", "groups", (("completions",),), group_from_paper),
    Schema(
        "sharegpt-pairs",
        "ShareGPT with two answers: conversations or messages, chosen, rejected, images",
        "groups",
        (_TURNS, ("chosen",), ("rejected",)),
        group_from_sharegpt,
    ),
    Schema(
        "rlaif-v",
        "RLAIF-V: question, chosen, rejected, image",
        "groups",
        (("question",), ("chosen",), ("rejected",)),
        group_from_rlhf_v,
        id_keys=("id", "idx"),
    ),
    Schema(
        "trl",
        "TRL: prompt, chosen, rejected, images",
        "groups",
        (("chosen",), ("rejected",)),
        group_from_trl,
    ),
    Schema(
        "rlhf-v",
        "RLHF-V: image, text (JSON with question, chosen, rejected)",
        "groups",
        (("text",), ("image", "image_path"), ("ds_name", "origin_dataset")),
        group_from_rlhf_v,
        id_keys=("id", "idx"),
    ),
    Schema(
        "annotations",
        "bpo's annotations: id, images, prompt (turns), response",
        "annotations",
        (("prompt",), ("response",), ("images", "image")),
        annotation_from_json,
        containers=frozenset({"jsonl", "list"}),
    ),
    Schema(
        "llava",
        "LLaVA and ShareGPT conversations: conversations or messages, image or images",
        "annotations",
        (_TURNS,),
        annotation_from_llava,
    ),
    Schema(
        "table",
        "captions and answers (COCO captions, CSV, TSV, WebDataset): an image column, a text column",
        "annotations",
        (IMAGE_COLUMNS, ANSWER_COLUMNS),
        annotation_from_row,
    ),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A file (or shards) with the schema of its records; None where there is no record."""

    container: Container
    schema: Schema | None


def open_source(path: Path, schema_name: str = "") -> Source:
    """A file with its schema: the named one, or the first that a record among the first `PROBED_RECORDS` fits.

    Raises:
        ValueError: The file cannot be read, or no record of it can be parsed: then the first one's error.
        UnknownFormat: No schema fits; lists all, and what was missing.
    """
    container = open_container(path)
    if schema_name:
        found = [schema for schema in SCHEMAS if schema.name == schema_name]
        if not found:
            names = ", ".join(schema.name for schema in SCHEMAS)
            raise ValueError(f"there is no format {schema_name!r}; the formats are {names}")
        return Source(container, found[0])
    first: tuple[Piece, Mapping[str, Any]] | None = None
    error: RecordError | None = None
    for piece in itertools.islice(container.pieces(), PROBED_RECORDS):
        try:
            value = piece.parse()
        except RecordError as damaged:
            error = error or damaged
            continue
        first = first or (piece, value)
        for schema in SCHEMAS:
            if not schema.missing(value, container.kind):
                return Source(container, schema)
    if first is not None:
        raise UnknownFormat(_explain(*first, container.kind))
    if error is not None:
        raise error
    return Source(container, None)


def _explain(piece: Piece, value: Mapping[str, Any], kind: str) -> str:
    lines = [f"{piece.where}: the fields {sorted(value)[:12]} are in no known form. bpo reads"]
    for schema in SCHEMAS:
        lines.append(f"  {schema.name}: {schema.title}; missing: {', '.join(schema.missing(value, kind))}")
    return "\n".join(lines)
