"""Registry of record schemas. Detects the schema from the fields of a record, or reports what each schema lacks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bpo.formats.importers.arrow import HUB
from bpo.formats.importers.containers import Container, UnknownFormat, open_container
from bpo.formats.importers.llava import annotation_from_llava
from bpo.formats.importers.names import RATED, TURN_FIELDS, canonical, object_hint, preference_field
from bpo.formats.importers.preferences import (
    PairRow,
    group_from_rejected,
    group_from_rlhf_v,
    group_from_sharegpt,
    group_from_trl,
)
from bpo.formats.importers.ratings import group_from_ratings, row_from_label
from bpo.formats.importers.tables import ANSWER_COLUMNS, IMAGE_COLUMNS, annotation_from_row
from bpo.formats.jsonfiles import Piece
from bpo.formats.problems import RecordError
from bpo.formats.schema import annotation_from_json, group_from_json, group_from_paper
from bpo.records import Annotation, PreferenceGroup

# Result of adapting a record; a str is the reason to skip it.
Outcome = Annotation | PreferenceGroup | PairRow | str
PROBED_RECORDS = 100
_HUB_NAME = re.compile(r"[\w-][\w.-]*/(?![\w.-]+\.(?:json|jsonl|csv|tsv|parquet|tar|gz|zst)$)[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class Schema:
    """Schema of a record.

    Attributes:
        name: Value of `bpo convert --from`.
        title: Origin and fields, for messages.
        gives: Type of the resulting records.
        needs: Required fields, each a tuple of alternative names.
        adapt: (record, id, where) -> outcome; raises `RecordError`.
        containers: Container formats it may come in; empty means all.
        id_keys: Alternative names of the id field.
        unique_ids: Whether ids are required and unique; otherwise a missing id is derived from the position, and the
            second `x` becomes `x#2`.
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
        """Returns the requirements of this schema that the record does not meet."""
        if self.containers and kind not in self.containers:
            return [f"another kind of file ({', '.join(sorted(self.containers))})"]
        return self.missing_fields(record)

    def missing_fields(self, record: Mapping[str, Any]) -> list[str]:
        return [" or ".join(repr(n) for n in names) for names in self.needs if not any(n in record for n in names)]


# Tried in this order, more specific schemas first.
SCHEMAS: tuple[Schema, ...] = (
    Schema(
        name="groups",
        title="bpo's groups, one per line: id, images, prompt, completions",
        gives="groups",
        needs=(("id",), ("completions",)),
        adapt=lambda value, record_id, where: group_from_json(value, where),
        containers=frozenset({"jsonl"}),
        unique_ids=True,
    ),
    Schema("paper", "the paper's release: prompt, image, completions", "groups", (("completions",),), group_from_paper),
    Schema(
        "sharegpt-pairs",
        "ShareGPT with two answers: conversations or messages, chosen, rejected, images",
        "groups",
        (TURN_FIELDS, ("chosen",), ("rejected",)),
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
        "ms-swift",
        "ms-swift, POVID: conversations or messages, rejected_response or rejected_messages or rejected_conversations",
        "groups",
        (TURN_FIELDS, ("rejected", "rejected_images")),
        group_from_rejected,
    ),
    Schema("vlfeedback", "VLFeedback: prompt, completions with annotations", "groups", ((RATED,),), group_from_ratings),
    Schema("kto", "KTO: conversations or messages, label", "groups", (TURN_FIELDS, ("label",)), row_from_label),
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
        (TURN_FIELDS,),
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
    """A file (or shards) with the schema of its records; None if there are no records."""

    container: Container
    schema: Schema | None


def open_source(path: Path, schema_name: str = "") -> Source:
    """Opens a file with the given schema, or the first schema that matches one of the first `PROBED_RECORDS` records.

    Raises:
        ValueError: The file cannot be read, or no record can be parsed (then the error of the first one).
        UnknownFormat: No schema matches; lists all schemas and what was missing for each.
    """
    if _HUB_NAME.fullmatch(str(path)) and not Path(path).exists():
        raise ValueError(
            f"{path} does not exist; if it is a dataset of the Hub: `bpo convert {HUB}{path} FILE.jsonl --images DIR`"
        )
    container = open_container(path)
    if schema_name:
        found = [schema for schema in SCHEMAS if schema.name == schema_name]
        if not found:
            names = ", ".join(schema.name for schema in SCHEMAS)
            raise ValueError(f"unknown format {schema_name!r}; supported formats: {names}")
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
        fields = canonical(value)
        for schema in SCHEMAS:
            if not schema.missing(fields, container.kind):
                return Source(container, schema)
    if first is not None:
        raise UnknownFormat(_explain(*first, container.kind))
    if error is not None:
        raise error
    return Source(container, None)


def form_of(schema: Schema, record: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> Schema:
    """Returns the schema of one record of a file: the file's, or another that gives the same and fits the record.

    Args:
        schema: Schema of the file.
        record: The record as it is in the file.
        fields: The record with canonical names.
        where: File, record and id, for messages.

    Raises:
        RecordError: The record is preference data among annotations, an annotation among groups, or a pair of answers
            to different images.
    """
    field = preference_field(record) if schema.gives == "annotations" else None
    if field is None and fields.get("rejected_images"):
        raise RecordError(
            "different-prompts",
            f"{where}: 'rejected_images' differ from 'images', but bpo compares answers to the same images; remove the "
            "record",
        )
    if field is None and not schema.missing_fields(fields):
        return schema
    other = next((other for other in SCHEMAS if not other.missing_fields(fields)), schema)
    if field is not None:
        fix = "name the answers 'chosen' and 'rejected', or remove the field"
        if other.gives == "groups":
            fix = f"move all records of the form {other.name!r} to a file of their own"
        raise RecordError(
            "preference-field",
            f"{where}: field {field!r} is preference data, but the file is read as annotations, whose answers are all "
            f"preferred; {fix}",
        )
    if "completions" in fields:
        return schema
    if other.gives != schema.gives:
        fix = "an annotation file (data.annotations, for bpo bootstrap)"
        if other.gives == "groups":
            fix = "a file of groups (data.groups)"
        raise RecordError("wrong-file", f"{where}: the record has the form {other.name!r}; move it to {fix}")
    return other


def _explain(piece: Piece, value: Mapping[str, Any], kind: str) -> str:
    found = f"{piece.where}: the fields {sorted(value)[:12]} match no supported format"
    if hint := object_hint(value):
        return f"{found}: {hint}"
    lines = [f"{found}. Supported formats:"]
    for schema in SCHEMAS:
        lines.append(f"  {schema.name}: {schema.title}; missing: {', '.join(schema.missing(canonical(value), kind))}")
    return "\n".join(lines)
