"""Images in a record in other forms than a path: bytes, base64, `data:` and `file:` URLs, objects, nested lists."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from bpo.formats.images import ImageError, is_embedded_text, local_path
from bpo.formats.markers import IMAGE_MARKER
from bpo.formats.problems import RecordError

# (name or None, content, where) -> the path that replaces the image in the record.
PutImage = Callable[[str | None, bytes, str], str]
IMAGE_FIELDS = ("image", "images")
OTHER_IMAGES, OTHER_COLUMN = "other_images", "bpo_other_images"  # of groups, and of their rows in TRL's format
# Fields of an object that holds the path or URL of an image, and those that it may have in addition.
_PATH_KEYS = ("path", "url", "image", "image_url", "file_name", "filename")
_OTHER_KEYS = frozenset(("type", "detail", "bytes"))
_NUMBERED = re.compile(r"<image_\d+>")


def image_fields(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the fields that hold images in a record of this form."""
    return (*IMAGE_FIELDS, OTHER_COLUMN, *([OTHER_IMAGES] if "completions" in record else []))


def plain_images(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the record with its images as paths, URLs or embedded images, in one list where there are several.

    Objects that hold only a path (`{"url": ...}`, `{"type": "image", "image": ...}`), nested lists, and lists as JSON
    text are replaced by what they hold; in MiniCPM's `{"<image_00>": path, ...}` the marker of each image by `<image>`.
    """
    plain = {field: record[field] for field in image_fields(record) if record.get(field)}
    for field, value in list(plain.items()):
        is_numbered = isinstance(value, Mapping) and all(_NUMBERED.fullmatch(str(key)) for key in value)
        if is_numbered and field in IMAGE_FIELDS:
            return plain_images({name: record[name] for name in record if name != field} | _marked(record, value))
        if isinstance(value, (list, Mapping)) or (isinstance(value, str) and value[:1] == "["):
            plain[field] = _plain(value)
    if plain.keys() >= set(IMAGE_FIELDS) and plain["images"] in (plain["image"], [plain["image"]]):
        return {name: value for name, value in record.items() if name != "image"} | {"images": plain["images"]}
    return record if all(plain[field] is record[field] for field in plain) else {**record, **plain}


def _marked(record: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `images` in the order of their markers, those without one first, and turns with `<image>` markers."""
    order: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match.group() not in images:
            return match.group()
        order.append(match.group())
        return IMAGE_MARKER

    def turn_of(turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        texts = {key: turn[key] for key in ("value", "content") if isinstance(turn.get(key), str)}
        return {**turn, **{key: _NUMBERED.sub(place, text) for key, text in texts.items()}}

    turns = {
        name: [turn_of(turn) for turn in record[name]]
        for name in ("conversations", "messages")
        if isinstance(record.get(name), list)
    }
    unmarked = [key for key in images if key not in order]
    return turns | {"images": [images[key] for key in (*unmarked, *order)]}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        return [part for item in items for part in (item if isinstance(item, list) else [item])]
    if isinstance(value, str) and value[:1] == "[":
        try:
            listed = json.loads(value)
        except ValueError:
            return value
        return listed if all(isinstance(path, str) for path in listed) else value
    if not isinstance(value, Mapping) or value.get("bytes") is not None:
        return value
    held = [key for key in value if value[key] is not None and key not in _OTHER_KEYS]
    inner = _plain(value[held[0]]) if len(held) == 1 and held[0] in _PATH_KEYS else None
    return inner if isinstance(inner, str) else value


def take_embedded(value: Mapping[str, Any], where: str, put: PutImage) -> Mapping[str, Any]:
    """Returns the record with every embedded image replaced by a path, and `file://` URLs by theirs.

    Raises:
        RecordError: An image has neither bytes nor a path, another field contains bytes (not representable in JSON),
            or `put` rejects an image.
    """
    changed = dict(value)
    for field in image_fields(value):
        if field in value:
            changed[field] = _with_paths(value[field], where, put)
    for field, content in changed.items():
        if _contains_bytes(content):
            raise RecordError(
                "wrong-type",
                f"{where}: field {field!r} contains bytes; only 'image' and 'images' may; remove the column",
            )
    return changed


def name_embedded(value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`take_embedded` for readers of texts: embedded images are replaced by their names and not written anywhere."""
    return take_embedded(value, where, lambda name, content, where: name or "embedded")


def _with_paths(value: Any, where: str, put: PutImage) -> Any:
    if isinstance(value, str):
        return put(None, _decoded(value, where), where) if is_embedded_text(value) else local_path(value)
    if isinstance(value, bytes):
        return put(None, value, where)
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        path, content = value.get("path"), value.get("bytes")
        if isinstance(content, str):
            content = _decoded(content, where)
        if isinstance(content, bytes):
            return put(path if isinstance(path, str) and path else None, content, where)
        if content is not None or not isinstance(path, str):
            raise RecordError("wrong-type", f"{where}: an image object has neither bytes nor a path; add one")
        return path
    return [_with_paths(image, where, put) for image in value] if isinstance(value, list) else value


def _decoded(text: str, where: str) -> bytes:
    """Returns the content of a `data:` URL or of base64 text."""
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(re.sub(r"\s|%0[AD]", "", data).replace("-", "+").replace("_", "/") + "==")
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"{where}: the image {text[:40]!r}... is damaged base64 ({error}); embed it again", "image-undecodable"
        ) from error


def _contains_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_contains_bytes, value.values()))
    return any(map(_contains_bytes, value)) if isinstance(value, list) else isinstance(value, bytes)
