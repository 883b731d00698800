"""Images embedded in a record, as in parquet and tar shards: `{"bytes", "path"}` in place of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bpo.formats.problems import RecordError

# (name or None, content, where) -> the path that replaces the image in the record.
PutImage = Callable[[str | None, bytes, str], str]
IMAGE_FIELDS = ("image", "images")


def take_embedded(value: Mapping[str, Any], where: str, put: PutImage) -> Mapping[str, Any]:
    """Returns the record with every embedded image replaced by a path.

    Raises:
        RecordError: An image has neither bytes nor a path, another field contains bytes (not representable in JSON),
            or `put` rejects an image.
    """
    changed = dict(value)
    for field in IMAGE_FIELDS:
        if field in value:
            changed[field] = _with_paths(value[field], where, put)
    for field, content in changed.items():
        if _contains_bytes(content):
            raise RecordError(
                "wrong-type",
                f"{where}: field {field!r} contains bytes; only 'image' and 'images' may; remove the column",
            )
    return changed


def _with_paths(value: Any, where: str, put: PutImage) -> Any:
    if isinstance(value, bytes):
        return put(None, value, where)
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        path, content = value.get("path"), value.get("bytes")
        if isinstance(content, bytes):
            return put(path if isinstance(path, str) and path else None, content, where)
        if content is not None or not isinstance(path, str):
            raise RecordError("wrong-type", f"{where}: an image object has neither bytes nor a path; add one")
        return path
    return [_with_paths(image, where, put) for image in value] if isinstance(value, list) else value


def _contains_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_contains_bytes, value.values()))
    return any(map(_contains_bytes, value)) if isinstance(value, list) else isinstance(value, bytes)
