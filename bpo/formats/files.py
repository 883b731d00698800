"""Reads annotations and preference groups from every file that `bpo.formats.importers` understands.

`groups.jsonl`, bpo's own form, holds one preference group a line:

    {"id": "000000033471", "images": ["coco/train2017/000000033471.jpg"],
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
     "completions": [{"response": "A bus.", "score": 1, "type": "gt"},
                     {"response": "A tram.", "score": 0, "type": "mllm-hal", "provenance": {"source": "weaken"}}]}

`image` may replace `images` (one path or a list). A prompt may be plain text, or turns whose content is plain text: the
images then stand first and the text is only text, even where it contains `<image>`. Fields that bpo does not read
are kept and handed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bpo.formats.bad_records import BadRecords
from bpo.formats.importers.arrow import HUB
from bpo.formats.importers.registry import Source, open_source
from bpo.formats.problems import RecordError
from bpo.formats.reading import iterate_records
from bpo.formats.schema import group_from_json, group_to_json
from bpo.records import Annotation, PreferenceGroup

__all__ = [
    "AnnotationFile",
    "group_from_json",
    "group_to_json",
    "iterate_annotations",
    "read_annotations",
    "read_groups",
]


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """What an annotation file gave.

    Attributes:
        annotations: The usable records, in order.
        skipped: Reason -> ids of the records that hold nothing to learn from, such as "text only".
    """

    annotations: tuple[Annotation, ...]
    skipped: Mapping[str, tuple[str, ...]]


def read_annotations(path: Path, bad: BadRecords | None = None) -> AnnotationFile:
    """Annotations from any file that holds them (`bpo.formats.importers.registry.SCHEMAS`), such as LLaVA's JSON.

    A missing id is made from the position (`record-7`). LLaVA's own mixture repeats ids: the second bearer of
    `x` becomes `x#2`.

    Args:
        bad: What becomes of bad records; by default the first one stops the reading.

    Raises:
        ValueError: Names file, record, field and fix.
    """
    skipped: dict[str, list[str]] = {}
    annotations = tuple(iterate_annotations(path, bad, skipped))
    return AnnotationFile(annotations, {reason: tuple(ids) for reason, ids in skipped.items()})


def iterate_annotations(
    path: Path, bad: BadRecords | None = None, skipped: dict[str, list[str]] | None = None
) -> Iterator[Annotation]:
    """As `read_annotations`, one at a time in bounded memory; ids of records left out go to `skipped` by reason."""
    source = _open(path, "annotations", "this is a file of preference groups; name it as data.groups")

    def left_out(reason: str, record_id: str) -> None:
        if skipped is not None:
            skipped.setdefault(reason, []).append(record_id)

    for record in iterate_records(source, bad or BadRecords(), left_out=left_out):
        assert isinstance(record, Annotation)
        if record.images:
            yield record
        else:
            left_out("text only", record.id)


def read_groups(path: Path, bad: BadRecords | None = None) -> tuple[PreferenceGroup, ...]:
    """Preference groups from any file that holds them: `groups.jsonl`, the paper's release, TRL, RLHF-V, RLAIF-V.

    In `groups.jsonl` an id is required and unique; elsewhere it may be missing or repeated, as in `read_annotations`.

    Args:
        bad: What becomes of bad records; by default the first one stops the reading.

    Raises:
        ValueError: Names file, record, field and fix.
    """
    message = "this is an annotation file; name it as data.annotations and run bpo bootstrap"
    groups = iterate_records(_open(path, "groups", message), bad or BadRecords())
    return tuple(group for group in groups if isinstance(group, PreferenceGroup))


def _open(path: Path, wanted: str, otherwise: str) -> Source:
    if str(path).startswith(HUB):
        raise ValueError(f"{path} is no file; `bpo convert {path} FILE.jsonl --images DIR` makes one of it")
    source = open_source(path)
    if source.schema is not None and source.schema.gives != wanted:
        where = next(source.container.pieces()).where
        raise RecordError("wrong-file", f"{where}: {otherwise}")
    return source
