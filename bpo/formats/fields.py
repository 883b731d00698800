"""Validation of record fields; error messages name the record, the field and the fix."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from bpo.formats.markers import IMAGE_PART, Content, place_images
from bpo.formats.problems import RecordError
from bpo.records import ROLES, ContentPart, Role, Turn

RECORD_KEYS = frozenset(("id", "images", "image", "prompt", "completions", "response", "other_images", "auxiliary"))
# The product of two weights or betas stays finite in the loss, and a number of another kind in this field is noticed.
MAX_WEIGHT = 1e6


def required(obj: Mapping[str, Any], key: str, where: str) -> Any:
    """Returns the value of a required field.

    Raises:
        RecordError: The field is absent or null.
    """
    if obj.get(key) is None:
        raise RecordError("missing-field", f"{where}: field {key!r} is missing; add it")
    return obj[key]


def text_of(value: Any, name: str, where: str) -> str:
    """Returns the value as text that can be encoded in UTF-8.

    Raises:
        RecordError: The value is not text, or contains a lone surrogate.
    """
    if not isinstance(value, str):
        raise RecordError("wrong-type", f"{where}: {name} is {type(value).__name__}, not text; quote it")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(
                "lone-surrogate", f"{where}: {name} contains a lone surrogate at {error.start}; remove it"
            ) from error
    return value


def answer_of(value: Any, name: str, where: str) -> str:
    """Returns the value as non-empty text.

    Raises:
        RecordError: See `text_of`; or the text is empty or all white space.
    """
    text = text_of(value, name, where)
    if not text.strip():
        raise RecordError("empty-text", f"{where}: {name} is empty; remove the completion")
    return text


def id_text(value: Any, where: str) -> str:
    """Returns an id as text.

    Raises:
        RecordError: The id is neither text nor an integer.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RecordError("invalid-id", f"{where}: field 'id' is {value!r}; it must be text or an integer")
    return text_of(str(value), "id", where)


def image_paths(value: Any, name: str, where: str) -> tuple[str, ...]:
    """Returns one path or a list of paths as a tuple. `datasets` writes a path as `{"bytes": null, "path": ...}`.

    Raises:
        RecordError: The value is anything else, such as an embedded image.
    """
    values = value if isinstance(value, list) else [value] if isinstance(value, (str, bytes, Mapping)) else [None]
    paths = [_path_of(image) for image in values]
    if any(isinstance(path, (bytes, Mapping)) for path in paths):
        raise RecordError(
            "image-embedded", f"{where}: field {name!r} contains an image; extract it to a folder with `bpo convert`"
        )
    if not all(isinstance(path, str) and path for path in paths):
        raise RecordError(
            "image-no-path" if "" in paths else "wrong-type",
            f"{where}: field {name!r} is {_short(value)}; write image paths relative to data.image_root, or [] for "
            "none",
        )
    return tuple(text_of(path, f"a path in {name!r}", where) for path in paths)


def _path_of(value: Any) -> Any:
    """Returns the path of an image object without bytes; any other value unchanged."""
    is_path = isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str)
    return value["path"] if is_path and value.keys() <= {"bytes", "path"} else value


def score_of(value: Any, name: str, where: str) -> float:
    """Returns a finite number as float.

    Raises:
        RecordError: The value is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise RecordError(
            "invalid-score", f"{where}: {name} is {_short(value)}; it must be a finite number (higher is preferred)"
        )
    return float(value)


def weight_of(value: Any, name: str, where: str) -> float:
    """Returns the weight of a completion.

    Raises:
        RecordError: The value is not a number from 0 to `MAX_WEIGHT`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_WEIGHT:
        raise RecordError(
            "invalid-weight",
            f"{where}: {name} is {_short(value)}; it must be a number from 0 (not trained on) to {MAX_WEIGHT:g}, or "
            "absent for 1",
        )
    return float(value)


def beta_of(value: Any, name: str, where: str) -> float:
    """Returns the factor of a completion for the inverse temperature of its pairs.

    Raises:
        RecordError: The value is not a number above 0, up to `MAX_WEIGHT`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_WEIGHT:
        raise RecordError(
            "invalid-beta",
            f"{where}: {name} is {_short(value)}; it must be a number above 0, up to {MAX_WEIGHT:g}, or absent for 1",
        )
    return float(value)


def spans_of(value: Any, text: str, name: str, where: str) -> tuple[tuple[int, int, float], ...]:
    """Returns the weights of spans of a text, `[[start, end, weight], ...]` in characters.

    Raises:
        RecordError: The value is anything else; a span is empty or leaves the text, begins before the end of the one
            before, or its weight is not a number from 0 to `MAX_WEIGHT`.
    """
    spans: list[tuple[int, int, float]] = []
    for number, span in enumerate(value if isinstance(value, list) else [value]):
        end_of_last = spans[-1][1] if spans else 0
        if not _is_span(span, end_of_last, len(text)):
            raise RecordError(
                "invalid-weights",
                f"{where}: {name}[{number}] is {_short(span)}; write a list of [start, end, weight] with integers "
                f"{end_of_last} <= start < end <= {len(text)} (characters of the response, in ascending order) and a "
                f"weight from 0 to {MAX_WEIGHT:g}",
            )
        spans.append((span[0], span[1], float(span[2])))
    return tuple(spans)


def _is_span(span: Any, first: int, length: int) -> bool:
    if not isinstance(span, list) or len(span) != 3 or any(isinstance(number, bool) for number in span):
        return False
    start, end, weight = span
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(weight, (int, float))):
        return False
    return first <= start < end <= length and 0 <= weight <= MAX_WEIGHT


def extra_of(
    obj: Mapping[str, Any], known: Collection[str], where: str, reserved: Collection[str] = RECORD_KEYS
) -> dict[str, Any]:
    """Returns the fields that bpo does not use, to be kept with the record.

    A field whose name is in `reserved` is renamed to `source_NAME`.

    Raises:
        RecordError: A field cannot be written as UTF-8 JSON.
    """
    extra = {key: value for key, value in obj.items() if key not in known}
    if not extra:
        return extra
    check_json(extra, "an unknown field", where)
    for key in [key for key in extra if key in reserved]:
        extra[f"source_{key}"] = extra.pop(key)
    return extra


def check_json(value: Any, name: str, where: str) -> None:
    """Checks that the value can be written as UTF-8 JSON.

    Raises:
        RecordError: The value contains NaN, infinity, a lone surrogate, or bytes.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("lone-surrogate", f"{where}: {name} contains a lone surrogate; remove it") from error
    except ValueError as error:
        raise RecordError("nan", f"{where}: {name} contains NaN or infinity; remove it") from error
    except (TypeError, RecursionError) as error:
        raise RecordError("wrong-type", f"{where}: {name} cannot be written as JSON ({error}); remove it") from error


def refuse_unknown(obj: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises `RecordError` if a key is not among the known ones."""
    unknown = [key for key in obj if key not in known]
    if unknown:
        raise RecordError("unknown-key", f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")


def prompt_turns(prompt: Any, num_images: int, where: str, *, may_start: bool = False) -> tuple[Turn, ...]:
    """Parses a prompt in bpo's format: text, or turns whose content is text or parts.

    `place_images` interprets `<image>` markers and places images without one.

    Args:
        may_start: Whether an assistant turn may follow the last user turn: the start of the answer, whose text is kept
            exactly.

    Raises:
        RecordError: The prompt is malformed, does not end with a user turn (or, with `may_start`, with the start of
            the answer after one), or see `place_images`; the start is empty or has an image.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError("wrong-type", f"{where}: field 'prompt' must be text or a non-empty list of turns")
    turns = [turn_of(turn, f"prompt[{number}]", where) for number, turn in enumerate(prompt)]
    last = turns[-1][0]
    starts = may_start and last == "assistant" and len(turns) > 1 and turns[-2][0] == "user"
    if last != "user" and not starts:
        otherwise = ", or the start of the answer directly after it" if may_start else ""
        raise RecordError(
            "turn-order",
            f"{where}: field 'prompt' ends with role {last!r}; the last turn must be the user's{otherwise}",
        )
    placed = place_images(turns, num_images, where)
    if starts:
        _check_start(placed[-1], where)
    return placed


def _check_start(start: Turn, where: str) -> None:
    """Raises RecordError if the start of an answer has an image or no text."""
    if start.num_images:
        raise RecordError(
            "image-parts",
            f"{where}: the last turn of 'prompt', the start of the answer, has an image; move it to a user turn",
        )
    if not start.text.strip():
        raise RecordError(
            "empty-text", f"{where}: the last turn of 'prompt', the start of the answer, is empty; remove the turn"
        )


def turn_of(turn: Any, name: str, where: str) -> tuple[Role, Content]:
    """Returns (role, text or parts) of one turn, `{"role": ..., "content": text or parts}`.

    Raises:
        RecordError: The turn is malformed.
    """
    if not isinstance(turn, dict):
        raise RecordError("wrong-type", f"{where}: {name} must be an object with 'role' and 'content'")
    refuse_unknown(turn, ("role", "content"), where)
    role = turn.get("role")
    if role not in ROLES:
        raise RecordError(
            "unknown-role", f"{where}: {name} has role {_short(role)}; it must be one of {', '.join(ROLES)}"
        )
    content = turn.get("content")
    if isinstance(content, str):
        return role, text_of(content, f"{name}.content", where)
    if not isinstance(content, list):
        raise RecordError("wrong-type", f"{where}: {name}.content must be text or a list of parts")
    return role, tuple(_part(part, f"{name}.content[{n}]", where) for n, part in enumerate(content))


def prompt_to_json(prompt: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Returns turns as JSON; the inverse of `prompt_turns`."""
    return [{"role": turn.role, "content": [part_to_json(part) for part in turn.content]} for turn in prompt]


def part_to_json(part: ContentPart) -> dict[str, str]:
    return {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}


def _part(part: Any, name: str, where: str) -> ContentPart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        refuse_unknown(part, ("type",), where)
        return IMAGE_PART
    if kind != "text":
        raise RecordError(
            "unknown-part",
            f'{where}: {name} must be {{"type": "text", "text": ...}} or {{"type": "image"}}; '
            "image paths belong in 'images'",
        )
    refuse_unknown(part, ("type", "text"), where)
    return ContentPart("text", text_of(part.get("text"), f"{name}.text", where))


def _short(value: Any) -> str:
    """Returns the representation of a value, shortened for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
