"""Container formats: JSON list, JSONL, COCO JSON, CSV, TSV, parquet, datasets, tar shards. Each yields `Piece`s.

All but parquet and datasets, which compress by themselves, may be compressed (`bpo.formats.compressed`).
All containers are streamed: at most one batch of records is in memory (for COCO, also its image names).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from bpo.formats.compressed import MAGIC_BYTES, StreamError, compression_of
from bpo.formats.foreign import foreign_kind
from bpo.formats.importers.arrow import HUB, hub_pieces, parquet_pieces, saved_pieces
from bpo.formats.importers.csvfiles import table_pieces
from bpo.formats.importers.names import object_hint
from bpo.formats.importers.shards import is_tar, tar_pieces
from bpo.formats.jsonfiles import HEAD_BYTES, Piece, json_pieces, open_file
from bpo.formats.jsonscan import Damage, JsonScanner


class UnknownFormat(ValueError):
    """A file in an unsupported format; the message lists the supported formats and what was missing for each."""


@dataclass(frozen=True, slots=True)
class Container:
    """Files of one container format.

    Attributes:
        kind: Key of `CONTAINERS`.
        paths: The file, or the shards of a folder sorted by name.
    """

    kind: str
    paths: tuple[Path, ...]

    @property
    def size_bytes(self) -> int | None:
        """Total size of the content; None if it is compressed."""
        return None if any(map(_compression, self.paths)) else sum(map(_size_of, self.paths))

    def pieces(self) -> Iterator[Piece]:
        """Yields the unparsed records; raises `ValueError` if a file cannot be read."""
        index = done_bytes = 0
        for path in self.paths:
            try:
                for piece in CONTAINERS[self.kind](path):
                    yield replace(piece, index=index, end_bytes=done_bytes + piece.end_bytes)
                    index += 1
            except StreamError as error:
                yield Piece(str(path), index, False, b"", Damage(error.code, error.args[0].removeprefix(f"{path}: ")))
                index += 1
            done_bytes += _size_of(path)


def _compression(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return compression_of(file.read(MAGIC_BYTES))


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def open_container(path: Path) -> Container:
    """Detects the container format from the content.

    A folder is a dataset saved with `datasets`, or a set of parquet files or tar shards; `hub:OWNER/NAME` is a dataset
    to stream.

    Raises:
        ValueError: The file cannot be read.
        UnknownFormat: The format is not in `CONTAINERS`.
    """
    path = Path(path)
    if str(path).startswith(HUB):
        return Container("hub", (path,))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            path = _only_split(path)
        if (path / "state.json").is_file():
            return Container("saved", (path,))
        for suffix in (".parquet", ".tar"):
            shards = tuple(sorted(path.rglob(f"*{suffix}")))
            if shards:
                return Container(_kind_of(shards[0]), shards)
        raise UnknownFormat(f"{path}: the folder has no .parquet or .tar files; give the file of records")
    return Container(_kind_of(path), (path,))


def _only_split(path: Path) -> Path:
    """Returns the split of a saved `DatasetDict`; raises `ValueError` unless there is exactly one."""
    splits = sorted(state.parent.name for state in path.glob("*/state.json"))
    if len(splits) != 1:
        fix = f"choose one, such as {path / splits[0]}" if splits else "save it again"
        raise ValueError(f"{path}: a saved dataset with the splits {', '.join(splits) or '(none)'}; {fix}")
    return path / splits[0]


def _kind_of(path: Path) -> str:
    with open_file(path) as file:
        head = file.read(HEAD_BYTES)
    compression = _compression(path)
    if head.startswith(b"PAR1") and compression:
        raise UnknownFormat(f"{path}: a parquet file inside {compression}; unpack it (parquet compresses by itself)")
    if head.startswith(b"PAR1"):
        return "parquet"
    foreign = foreign_kind(head, path.name)
    if foreign is not None:
        raise UnknownFormat(f"{path} is {foreign}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"[":
        return "list"
    if text[:1] == b"{":
        if _is_coco(path):
            return "coco"
        if text.split(b"\n")[0].strip() == b"{":
            hint = object_hint(_first_member(path)) or "write a list of objects, or one per line"
            raise UnknownFormat(f"{path}: a JSON object spans several lines; {hint}")
        return "jsonl"
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return suffix[1:]
    if suffix in (".json", ".jsonl", ".ndjson"):
        return "jsonl"  # with a damaged first line, or empty
    if head and is_tar(path):
        return "tar"
    raise UnknownFormat(
        f"{path}: not a JSON list or JSONL, CSV, TSV, parquet or tar file; first bytes: {head[:16]!r}; "
        "tables must have the suffix .csv or .tsv"
    )


def _first_member(path: Path) -> dict[str, Any]:
    """Returns the first member of a JSON object, a list with its first element only; nothing if it is damaged."""
    try:
        with open_file(path) as file:
            scanner = _inside_object(file)
            key = json.loads(scanner.value())
            scanner.expect(":")
            if scanner.peek() != "[":
                return {key: json.loads(scanner.value())}
            scanner.expect("[")
            return {key: [json.loads(source) for source, _ in itertools.islice(scanner.elements(), 1)]}
    except (ValueError, RecursionError):
        return {}


def _inside_object(file: BinaryIO) -> JsonScanner:
    scanner = JsonScanner(file)
    if scanner.peek() == "\ufeff":
        scanner.expect("\ufeff")
    scanner.expect("{")
    return scanner


def _is_coco(path: Path) -> bool:
    """Returns whether the file is one object with COCO's lists, not JSONL."""
    try:
        for key, element in _coco_lists(path, first_only=True):
            if isinstance(element, dict) and (
                key == "annotations" and "image_id" in element or key == "images" and "file_name" in element
            ):
                return True
    except ValueError:  # the JSONL reader reports the error
        return False
    return False


def _coco_lists(path: Path, first_only: bool = False) -> Iterator[tuple[str, dict[str, Any] | Damage]]:
    """Yields (key, element) of the lists in a JSON object; damaged elements as `Damage`."""
    with open_file(path) as file:
        scanner = _inside_object(file)
        while scanner.peek() != "}":
            key = json.loads(scanner.value())
            scanner.expect(":")
            if scanner.peek() == "[":
                scanner.expect("[")
                for source, damage in scanner.elements():
                    value = damage if damage is not None else _object_or_damage(source)
                    if value is not None:
                        yield key, value
                    if first_only and value is None:
                        return
            else:
                scanner.value()
            if scanner.peek() == "}":
                return
            scanner.expect(",")


def _object_or_damage(source: str) -> dict[str, Any] | Damage | None:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        return Damage("not-json", f"not JSON ({error})")
    return value if isinstance(value, dict) else None


def _coco_pieces(path: Path) -> Iterator[Piece]:
    """Yields one record per COCO caption, with its image's file name; other caption fields are kept."""
    try:
        yield from _captions(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; download the file again") from error


def _captions(path: Path) -> Iterator[Piece]:
    names: dict[Any, Any] = {}
    for key, image in _coco_lists(path):
        if key == "images" and isinstance(image, dict) and isinstance(image.get("id"), (int, str)):
            names[image["id"]] = image.get("file_name")
    index = 0
    for key, caption in _coco_lists(path):
        if key != "annotations":
            continue
        where = f"{path}, annotations[{index}]"
        if isinstance(caption, Damage):
            yield Piece(where, index, True, {}, caption)
        else:
            image_id = caption.get("image_id")
            known = isinstance(image_id, (int, str)) and image_id in names
            damage = None if known else Damage("missing-field", f"no image has the id {image_id!r}; add it to 'images'")
            yield Piece(where, index, True, {**caption, "image": names.get(image_id) if known else None}, damage)
        index += 1


CONTAINERS: dict[str, Callable[[Path], Iterator[Piece]]] = {
    "list": json_pieces,
    "jsonl": json_pieces,
    "coco": _coco_pieces,
    "csv": lambda path: table_pieces(path, ","),
    "tsv": lambda path: table_pieces(path, "\t"),
    "parquet": parquet_pieces,
    "saved": saved_pieces,
    "hub": hub_pieces,
    "tar": tar_pieces,
}
