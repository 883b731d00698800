"""Fields of records: checked where they enter, with messages that name record, field and fix."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from bpo.formats.markers import IMAGE_PART
from bpo.formats.problems import RecordError
from bpo.records import ROLES, ContentPart, Turn

RECORD_KEYS = frozenset(("id", "images", "image", "prompt", "completions", "response"))


def required(obj: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a field that must be there.

    Raises:
        RecordError: It is absent or null.
    """
    if obj.get(key) is None:
        raise RecordError("missing-field", f"{where}: field {key!r} is missing; add it")
    return obj[key]


def text_of(value: Any, name: str, where: str) -> str:
    """The value as text that a UTF-8 file can hold.

    Raises:
        RecordError: It is no text, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError("wrong-type", f"{where}: {name} is {type(value).__name__}, not text; quote it")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(
                "lone-surrogate", f"{where}: {name} holds half a surrogate pair at {error.start}; remove it"
            ) from error
    return value


def answer_of(value: Any, name: str, where: str) -> str:
    """A text that is not empty.

    Raises:
        RecordError: See `text_of`; or it is empty or all white space.
    """
    text = text_of(value, name, where)
    if not text.strip():
        raise RecordError("empty-text", f"{where}: {name} is empty; remove the completion")
    return text


def id_text(value: Any, where: str) -> str:
    """An id as text.

    Raises:
        RecordError: It is neither text nor a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RecordError("invalid-id", f"{where}: field 'id' is {value!r}; it must be text or a whole number")
    return text_of(str(value), "id", where)


def image_paths(value: Any, name: str, where: str) -> tuple[str, ...]:
    """One path, or a list of them, as paths; [] for none. `datasets` writes a path as `{"bytes": null, "path": ...}`.

    Raises:
        RecordError: It is anything else; an image that stands in the file itself is said to.
    """
    values = value if isinstance(value, list) else [value] if isinstance(value, (str, Mapping)) else [None]
    paths = [_path_of(one) for one in values]
    if any(isinstance(path, Mapping) for path in paths):
        raise RecordError(
            "image-embedded", f"{where}: field {name!r} holds an image itself; `bpo convert` writes it to a folder"
        )
    if not all(isinstance(path, str) and path for path in paths):
        raise RecordError(
            "image-no-path" if "" in paths else "wrong-type",
            f"{where}: field {name!r} is {_short(value)}; name image paths relative to data.image_root, or write [] "
            "for none",
        )
    return tuple(text_of(path, f"a path in {name!r}", where) for path in paths)


def _path_of(value: Any) -> Any:
    """The path in an object that holds no image itself."""
    is_path = isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str)
    return value["path"] if is_path and value.keys() <= {"bytes", "path"} else value


def score_of(value: Any, name: str, where: str) -> float:
    """A finite number.

    Raises:
        RecordError: It is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise RecordError(
            "invalid-score", f"{where}: {name} is {_short(value)}; it must be a finite number (higher is preferred)"
        )
    return float(value)


def extra_of(
    obj: Mapping[str, Any], known: Collection[str], where: str, reserved: Collection[str] = RECORD_KEYS
) -> dict[str, Any]:
    """The fields that bpo does not read: they stay with the record.

    One that bears a name of bpo's own record (`reserved`) is kept as `source_NAME`.

    Raises:
        RecordError: A field holds what no JSON file in UTF-8 can hold.
    """
    extra = {key: value for key, value in obj.items() if key not in known}
    if not extra:
        return extra
    check_json(extra, "an unknown field", where)
    for key in [key for key in extra if key in reserved]:
        extra[f"source_{key}"] = extra.pop(key)
    return extra


def check_json(value: Any, name: str, where: str) -> None:
    """Refuses what no JSON file in UTF-8 can hold.

    Raises:
        RecordError: Somewhere in the value is NaN, infinity, half a surrogate pair, or bytes.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("lone-surrogate", f"{where}: {name} holds half a surrogate pair; remove it") from error
    except ValueError as error:
        raise RecordError("nan", f"{where}: {name} holds NaN or infinity; remove it") from error
    except (TypeError, RecursionError) as error:
        raise RecordError("wrong-type", f"{where}: {name} cannot be written as JSON ({error}); remove it") from error


def refuse_unknown(obj: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises: RecordError: a key is not among the known ones."""
    unknown = [key for key in obj if key not in known]
    if unknown:
        raise RecordError("unknown-key", f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")


def prompt_turns(prompt: Any, num_images: int, where: str) -> tuple[Turn, ...]:
    """A prompt in bpo's own form: text, or turns whose content is text or parts.

    Text is only text. Where no image part stands, the images come first in the first user turn.

    Raises:
        RecordError: It has another form, does not end with the user's turn, or has another number of image parts.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError("wrong-type", f"{where}: field 'prompt' must be text or a non-empty list of turns")
    turns = [turn_of(turn, f"prompt[{number}]", where) for number, turn in enumerate(prompt)]
    if turns[-1].role != "user":
        raise RecordError(
            "turn-order", f"{where}: field 'prompt' ends with a turn of {turns[-1].role!r}; end it with the user's"
        )
    num_parts = sum(turn.num_images for turn in turns)
    if num_parts == 0 and num_images:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", (IMAGE_PART,) * num_images + turns[first].content)
    elif num_parts != num_images:
        raise RecordError(
            "image-parts",
            f"{where}: field 'prompt' holds {num_parts} image parts for {num_images} images; make them equal "
            "(or write no image part, and the images stand first)",
        )
    return tuple(turns)


def turn_of(turn: Any, name: str, where: str) -> Turn:
    """One turn, `{"role": ..., "content": text or parts}`.

    Raises:
        RecordError: It has another form.
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
        text = text_of(content, f"{name}.content", where)
        return Turn(role, (ContentPart("text", text),) if text else ())
    if not isinstance(content, list):
        raise RecordError("wrong-type", f"{where}: {name}.content must be text or a list of parts")
    return Turn(role, tuple(_part(part, f"{name}.content[{n}]", where) for n, part in enumerate(content)))


def prompt_to_json(prompt: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Turns as JSON; `prompt_turns` gives them back."""
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
            "the image's path stands in 'images'",
        )
    refuse_unknown(part, ("type", "text"), where)
    return ContentPart("text", text_of(part.get("text"), f"{name}.text", where))


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
