"""Reads annotations and preference groups from every format supported by `bpo.formats.importers`.

`groups.jsonl`, bpo's own format, has one preference group per line:

    {"id": "000000033471", "images": ["coco/train2017/000000033471.jpg"],
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
     "completions": [{"response": "A bus.", "score": 1, "type": "gt"},
                     {"response": "A tram.", "score": 0, "type": "mllm-hal", "provenance": {"source": "weaken"}}]}

`image` is an alias of `images` (one path or a list). A prompt may be plain text, or turns whose content is plain text:
`<image>` in the text of a user turn marks an image, and unmarked images come first. Fields that bpo does not use are
kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bpo.formats.bad_records import BadRecords
from bpo.formats.importers.arrow import HUB
from bpo.formats.importers.registry import Source, open_source
from bpo.formats.problems import RecordError
from bpo.formats.reading import TakeImages, iterate_records
from bpo.formats.schema import group_from_json, group_to_json
from bpo.records import Annotation, PreferenceGroup

__all__ = [
    "AnnotationFile",
    "group_from_json",
    "group_to_json",
    "iterate_annotations",
    "iterate_groups",
    "read_annotations",
    "read_groups",
]


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """Contents of an annotation file.

    Attributes:
        annotations: The usable records, in order.
        skipped: Reason (such as "text only") -> ids of the records without a training signal.
    """

    annotations: tuple[Annotation, ...]
    skipped: Mapping[str, tuple[str, ...]]


def read_annotations(path: Path, bad: BadRecords | None = None) -> AnnotationFile:
    """Reads annotations in any supported format (`bpo.formats.importers.registry.SCHEMAS`), such as LLaVA's JSON.

    A missing id is derived from the position (`record-7`). LLaVA's data mixture contains duplicate ids: the second
    `x` becomes `x#2`.

    Args:
        bad: Handling of bad records; by default the first one raises an error.

    Raises:
        ValueError: Names the file, record, field and fix.
    """
    skipped: dict[str, list[str]] = {}
    annotations = tuple(iterate_annotations(path, bad, skipped))
    return AnnotationFile(annotations, {reason: tuple(ids) for reason, ids in skipped.items()})


def iterate_annotations(
    path: Path, bad: BadRecords | None = None, skipped: dict[str, list[str]] | None = None
) -> Iterator[Annotation]:
    """Like `read_annotations`, streaming in bounded memory; ids of skipped records are added to `skipped` by reason."""
    source = _open(path, "annotations", "this file contains preference groups; set it as data.groups")

    def left_out(reason: str, record_id: str) -> None:
        if skipped is not None:
            skipped.setdefault(reason, []).append(record_id)

    for record in iterate_records(source, bad or BadRecords(), left_out=left_out):
        assert isinstance(record, Annotation)
        if record.images:
            yield record
        else:
            left_out("text only", record.id)


def read_groups(
    path: Path, bad: BadRecords | None = None, skipped: dict[str, list[str]] | None = None
) -> tuple[PreferenceGroup, ...]:
    """Reads preference groups in any supported format: `groups.jsonl`, the paper's release, TRL, RLHF-V, RLAIF-V.

    `groups.jsonl` requires unique ids; other formats may omit or repeat them, as in `read_annotations`.

    Args:
        bad: Handling of bad records; by default the first one raises an error.
        skipped: Receives the ids of the records that are left out, by reason (a code of `PROBLEMS`).

    Raises:
        ValueError: Names the file, record, field and fix.
    """
    message = "this is an annotation file; set it as data.annotations and run bpo bootstrap"

    def left_out(reason: str, record_id: str) -> None:
        if skipped is not None:
            skipped.setdefault(reason, []).append(record_id)

    groups = iterate_records(_open(path, "groups", message), bad or BadRecords(), left_out=left_out)
    return tuple(group for group in groups if isinstance(group, PreferenceGroup))


def iterate_groups(path: Path, bad: BadRecords, take_images: TakeImages | None = None) -> Iterator[PreferenceGroup]:
    """Yields every usable group of a groups file in any supported format, in file order.

    Args:
        take_images: Replaces embedded images; without it, records that have one are bad.

    Raises:
        ValueError: The file is empty or holds annotations; see also `iterate_records`.
    """
    source = open_source(path)
    if source.schema is None:
        raise ValueError(f"{path}: the file has no records")
    if source.schema.gives != "groups":
        raise ValueError(f"{path} holds annotations ({source.schema.name}); create groups from them with bpo bootstrap")
    for record in iterate_records(source, bad, take_images=take_images):
        assert isinstance(record, PreferenceGroup)
        yield record


def _open(path: Path, wanted: str, otherwise: str) -> Source:
    if str(path).startswith(HUB):
        raise ValueError(f"{path} is not a file; download it with `bpo convert {path} FILE.jsonl --images DIR`")
    source = open_source(path)
    if source.schema is not None and source.schema.gives != wanted:
        where = next(source.container.pieces()).where
        raise RecordError("wrong-file", f"{where}: {otherwise}")
    return source
