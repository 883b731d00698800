"""Images that stand in a record itself, as parquet and tar shards hold them: `{"bytes", "path"}` in place of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bpo.formats.problems import RecordError

# (name or None, content, where) -> the path that stands in the record from now on.
PutImage = Callable[[str | None, bytes, str], str]
IMAGE_FIELDS = ("image", "images")


def take_embedded(value: Mapping[str, Any], where: str, put: PutImage) -> Mapping[str, Any]:
    """The record with a path in place of every image that stands in it.

    Raises:
        RecordError: An image has neither bytes nor a path, another field holds bytes, which no JSON can hold, or `put`
            refuses an image.
    """
    changed = dict(value)
    for field in IMAGE_FIELDS:
        if field in value:
            changed[field] = _with_paths(value[field], where, put)
    for field, one in changed.items():
        if _holds_bytes(one):
            raise RecordError(
                "wrong-type", f"{where}: field {field!r} holds bytes; only 'image' and 'images' may, remove the column"
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
            raise RecordError("wrong-type", f"{where}: an image is an object with neither bytes nor a path; give one")
        return path
    return [_with_paths(one, where, put) for one in value] if isinstance(value, list) else value


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bytes, value.values()))
    return any(map(_holds_bytes, value)) if isinstance(value, list) else isinstance(value, bytes)
