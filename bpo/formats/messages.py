"""Chat messages whose content is a list of parts, in which image parts may contain their own paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpo.formats.fields import text_of
from bpo.formats.problems import RecordError

MESSAGE_FIELDS = ("messages", "conversations", "prompt", "chosen", "rejected")
# Types of parts: transformers, Qwen and verl use `text` and `image`, OpenAI the others, Oumi the last.
_TEXT_PARTS = ("input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image", "image_path")
# Keys of an image's path in a part: transformers and Qwen use the first three, OpenAI the fourth, Oumi the last.
_SOURCES = ("image", "path", "url", "image_url", "content")
# Beginnings of the types of parts with other media: video, video_url, audio, input_audio ...
_OTHER_PARTS = ("video", "audio", "input_audio", "input_video")


def lift_images(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Moves the image paths in message parts to `images`, leaving parts of the types `text` and `image`.

    Raises:
        RecordError: The record has images in both places, or its message fields have different images.
    """
    lists = {name: record[name] for name in MESSAGE_FIELDS if isinstance(record.get(name), list)}
    bare: dict[str, list[Any]] = {}
    lifted: dict[str, list[Any]] = {}
    for name, messages in lists.items():
        if any(isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages):
            sources: list[Any] = []
            bare[name] = [_bare_message(message, sources) for message in messages]
            if sources:
                lifted[name] = sources
    if not lifted:
        return {**record, **bare} if bare else record
    if record.get("image") or record.get("images"):
        raise RecordError("wrong-type", f"{where}: images are in the messages and in a separate field; keep one")
    images = next(iter(lifted.values()))
    if any(sources != images for sources in lifted.values()):
        raise RecordError("wrong-type", f"{where}: {' and '.join(lifted)} contain different images; use one prompt")
    others = {name: value for name, value in record.items() if name not in ("image", "images")}
    return others | bare | {"images": images}


def refuse_other_media(record: Mapping[str, Any], where: str) -> None:
    """Raises RecordError if a field or a part of a message has a video or audio, which bpo does not read."""
    found = [name for name in ("video", "videos", "audio", "audios") if _holds_any(record.get(name))]
    for name in MESSAGE_FIELDS:
        for message in record[name] if isinstance(record.get(name), list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                parts = [part for part in content if isinstance(part, dict)]
                found += [str(part["type"]) for part in parts if str(part.get("type")).startswith(_OTHER_PARTS)]
    if found:
        raise RecordError("other-media", f"{where}: the record has a {found[0]}; bpo trains on images only")


def _holds_any(value: Any) -> bool:
    return any(map(_holds_any, value)) if isinstance(value, list) else value not in (None, "", {})


def without_nulls(messages: Any) -> Any:
    """Removes artefacts of tables from messages: null fields, and image numbers (`index`).

    The numbers are kept if the images are out of order, since they carry information then.
    """
    if not isinstance(messages, list):
        return messages
    cleaned = []
    images: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message, dict):
            message = {key: value for key, value in message.items() if value is not None}
            if isinstance(message.get("content"), list):
                message["content"] = [_without_nulls(part) for part in message["content"]]
                images += [
                    part for part in message["content"] if isinstance(part, dict) and part.get("type") == "image"
                ]
        cleaned.append(message)
    if [part.get("index") for part in images] == list(range(len(images))):
        for part in images:
            del part["index"]
    return cleaned


def turns_of_columns(value: Any) -> Any:
    """Transposes turns stored as columns, `{"from": [...], "value": [...]}`, as older versions of `datasets` did."""
    if not isinstance(value, dict) or not ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys()):
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]


def content_text(content: Any, name: str, where: str) -> str:
    """Returns content without images as text.

    Raises:
        RecordError: The content is neither text nor a list of text parts.
    """
    if not isinstance(content, list):
        return text_of(content, name, where)
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(text_of(text, f"{name}, a part", where) for text in texts)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _without_nulls(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    # TRL's collator also writes `text` in image parts.
    no_text = _is_image(part)
    return {key: value for key, value in part.items() if value is not None and not (no_text and key == "text")}


def _bare_message(message: Any, sources: list[Any]) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_bare_part(part, sources) for part in message["content"]]}


def _bare_part(part: Any, sources: list[Any]) -> Any:
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        return part | {"type": "text"}
    if not isinstance(part, dict) or part.get("type") not in _IMAGE_PARTS:
        return part
    name = next((name for name in _SOURCES if part.get(name) is not None), None)
    if name is None:
        return part
    source = part[name]
    # OpenAI's object may have `detail`, a hint for its servers.
    is_url = isinstance(source, dict) and source.keys() - {"detail"} == {"url"}
    sources.append(source["url"] if is_url else source)
    return {key: value for key, value in part.items() if key not in (*_SOURCES, "detail")} | {"type": "image"}
