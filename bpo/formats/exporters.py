"""Exporters: bpo's JSONL, TRL's parquet and JSONL, and the paper's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from bpo.formats.embedded import OTHER_COLUMN
from bpo.formats.fields import prompt_to_json
from bpo.formats.images import read_image_file
from bpo.formats.importers.preferences import CHOSEN_META, GROUP_META, REJECTED_META
from bpo.formats.markers import IMAGE_MARKER
from bpo.formats.problems import RecordError
from bpo.formats.schema import (
    annotation_to_json,
    auxiliary_to_json,
    completion_to_json,
    factors_to_json,
    group_from_paper,
    group_to_json,
)
from bpo.job.durable import replacing
from bpo.records import Annotation, Completion, PreferenceGroup

PARQUET_ROWS = 64  # at a time in memory, with their images


def write_jsonl(records: Iterable[Annotation | PreferenceGroup], path: Path) -> int:
    """Writes groups or annotations in bpo's format, one per line; returns their number."""
    count = 0
    with _whole_file(path) as file:
        for record in records:
            tree = group_to_json(record) if isinstance(record, PreferenceGroup) else annotation_to_json(record)
            file.write(_dump(tree) + b"\n")
            count += 1
    return count


def write_paper(groups: Iterable[PreferenceGroup], path: Path) -> int:
    """Writes groups in the paper's released schema as one JSON list; returns their number.

    A prompt that a text with `<image>` cannot represent (earlier turns, images within text) is written as turns. bpo
    reads these, as well as provenance and additional fields; the paper's code does not.
    """
    count = 0
    with _whole_file(path) as file:
        for group in groups:
            file.write((b",\n" if count else b"[\n") + _dump(group_to_paper(group)))
            count += 1
        file.write(b"\n]\n" if count else b"[]\n")
    return count


def group_to_paper(group: PreferenceGroup) -> dict[str, Any]:
    """Returns a group as JSON in the paper's released schema; the inverse of `group_from_paper`."""
    tree = group_to_json(group)
    images = tree.pop("images")
    tree = {"id": tree.pop("id"), "image": images[0] if len(images) == 1 else images, **tree}
    if len(group.prompt) == 1:
        text = "".join(part.text or f"{IMAGE_MARKER}\n" for part in group.prompt[0].content)
        as_text = {**tree, "prompt": text}
        with suppress(RecordError):  # text that is refused, such as further markers
            if group_from_paper(as_text, group.id, group.id) == group:
                return as_text
    return tree


def write_trl_jsonl(groups: Iterable[PreferenceGroup], path: Path, image_root: Path) -> int:
    """Writes TRL preference rows with image paths, one pair per line; returns the number of rows."""
    count = 0
    with _whole_file(path) as file:
        for group in groups:
            for row in trl_rows(group):
                images = {"images": list(group.images)}
                images |= {OTHER_COLUMN: list(group.other_images)} if group.other_images else {}
                file.write(_dump({**row, **images}) + b"\n")
                count += 1
    return count


def write_trl_parquet(groups: Iterable[PreferenceGroup], path: Path, image_root: Path) -> int:
    """Writes TRL preference rows with embedded images, as `datasets` reads them; returns the number of rows.

    Raises:
        ValueError: pyarrow is not installed.
        ImageError: An image cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet requires pyarrow; pip install 'bpo[hub]'") from error

    def embedded(images: Iterable[str]) -> list[dict[str, Any]]:
        return [{"bytes": read_image_file(image_root, image).read_bytes(), "path": image} for image in images]

    schema = _parquet_schema(pyarrow)
    rows = (
        {**row, **images}
        for group in groups
        for images in [{"images": embedded(group.images), OTHER_COLUMN: embedded(group.other_images)}]
        for row in trl_rows(group)
    )
    count = 0
    with _whole_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while batch := list(islice(rows, PARQUET_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def trl_rows(group: PreferenceGroup) -> Iterator[dict[str, Any]]:
    """Yields one row per pair of a group (see `trl_pairs`), without images.

    `prompt`, `chosen` and `rejected` are TRL messages. The columns `bpo_group`, `bpo_chosen` and `bpo_rejected` hold
    as JSON what TRL has no columns for: the group's id, other fields, auxiliary prompts and completions of its other
    images or of no pair; each completion's index, score, type, provenance, weight, beta, weights of characters and
    flags. The importer uses them to reassemble the group.

    Raises:
        RecordError: All completions have the same score, so there is no pair.
    """
    prompt = prompt_to_json(group.prompt)
    for turn in prompt:
        # All parts of a table need the same type; TRL writes image parts the same way.
        turn["content"] = [{"type": part["type"], "text": part.get("text")} for part in turn["content"]]
    meta: dict[str, Any] = {"id": group.id, "completions": len(group.completions), "extra": dict(group.extra)}
    if group.auxiliary:
        meta["auxiliary"] = auxiliary_to_json(group.auxiliary)
    if others := [
        [index, completion_to_json(c)] for index, c in enumerate(group.completions) if c.view or not c.paired
    ]:
        meta["others"] = others
    for i, j in trl_pairs(group):
        yield {
            "prompt": prompt,
            "chosen": _message(group.completions[i]),
            "rejected": _message(group.completions[j]),
            GROUP_META: json.dumps(meta),
            CHOSEN_META: _completion_meta(group.completions[i], i),
            REJECTED_META: _completion_meta(group.completions[j], j),
        }


def trl_pairs(group: PreferenceGroup) -> list[tuple[int, int]]:
    """Returns all (i, j) with score_i > score_j of the completions that take part in pairs about the group's images.

    Raises:
        RecordError: There is no pair.
    """
    own = [(index, c.score) for index, c in enumerate(group.completions) if c.paired and not c.view]
    pairs = [(i, j) for i, score in own for j, other in own if score > other]
    if not pairs:
        raise RecordError("no-preference", f"group {group.id!r}: all completions have the same score; TRL needs pairs")
    return pairs


def _message(completion: Completion) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": completion.response}]}]


def _completion_meta(completion: Completion, index: int) -> str:
    meta = {"index": index, "score": completion.score, "type": completion.type, "extra": dict(completion.extra)}
    provenance = None if completion.provenance is None else completion.provenance.to_json()
    return json.dumps({**meta, **factors_to_json(completion), "provenance": provenance})


def _parquet_schema(pyarrow: Any) -> Any:
    text = pyarrow.string()
    part = pyarrow.struct([("type", text), ("text", text)])
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", pyarrow.list_(part))]))
    images = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)]))
    columns = {"images": images, "prompt": messages, "chosen": messages, "rejected": messages}
    columns |= {GROUP_META: text, CHOSEN_META: text, REJECTED_META: text, OTHER_COLUMN: images}
    value = {"dtype": "string", "_type": "Value"}
    turns = [{"role": value, "content": [{"type": value, "text": value}]}]
    pictures = {"feature": {"_type": "Image"}, "_type": "Sequence"}
    features: dict[str, Any] = {"images": pictures, OTHER_COLUMN: pictures}
    features |= {name: turns for name in ("prompt", "chosen", "rejected")}
    features |= {name: value for name in (GROUP_META, CHOSEN_META, REJECTED_META)}
    # `datasets` needs these features to decode the images.
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema(list(columns.items()), metadata=metadata)


def _dump(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False).encode("utf-8")


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file that is renamed to `path` on success and removed on error.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as file:
            yield file
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error}); check the folder and disk space, or use another path"
        ) from error
