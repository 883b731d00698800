"""Conversation importers: LLaVA (`image`, `conversations`) and ShareGPT (`images`, `messages`) to annotations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bpo.formats.fields import extra_of, image_paths, text_of, turn_of
from bpo.formats.markers import place_images
from bpo.formats.messages import content_text, without_nulls
from bpo.formats.problems import RecordError
from bpo.records import Annotation, Role, Turn

ROLE_OF_SPEAKER: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
TOOL_ROLES = frozenset(("tool", "tool_call", "tool_response", "function", "function_call", "observation"))
TEXT_ONLY = "text only"
NO_ANSWER = "no answer"
NOT_ALTERNATING = "turns do not alternate"
KNOWN_KEYS = frozenset(("id", "image", "images", "conversations", "messages", "system"))


def annotation_from_llava(obj: Mapping[str, Any], record_id: str, where: str) -> Annotation | str:
    """Converts one record to an annotation, or returns the reason to skip it.

    The last `gpt` turn is the response. All turns before it, including earlier answers, form the prompt; turns after it
    are dropped. A conversation with n answers therefore yields one annotation, with its full context.
    `bpo.formats.markers.place_images` interprets `<image>` markers. Other fields are kept in `extra`, those of turns as
    `source_turns`.

    Args:
        obj: The record.
        record_id: Id of the record.
        where: File, record and id, for messages.

    Returns:
        The annotation, or `TEXT_ONLY`, `NO_ANSWER` (no `gpt` turn, or an empty one) or `NOT_ALTERNATING` (turns do not
        alternate between user and answer, starting with the user).

    Raises:
        RecordError: The record is malformed; names `where`, the field and the fix.
    """
    images = conversation_images(obj, where)
    turns = conversation_turns(obj, where)
    if not images:
        place_images([turn for turn in turns if isinstance(turn[1], str)], 0, where)  # refuses markers without an image
        return TEXT_ONLY
    last = max((n for n, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    prompt, response = turns[:last], content_text(turns[last][1], "the answer", where) if last >= 0 else ""
    if not response.strip():
        return NO_ANSWER
    if not ends_with_the_user(prompt):
        return NOT_ALTERNATING
    extra = conversation_extra(obj, KNOWN_KEYS, where)
    return Annotation(record_id, images, prompt_of(prompt, len(images), where), response.strip(), extra)


def prompt_of(turns: list[tuple[Role, Any]], num_images: int, where: str) -> tuple[Turn, ...]:
    """Builds the prompt from (role, text or list of parts); see `place_images`.

    Raises:
        RecordError: A part is neither text nor an image, or see `place_images`.
    """
    messages = without_nulls([{"role": role, "content": content} for role, content in turns])
    parsed = [turn_of(message, f"turn {number}", where) for number, message in enumerate(messages)]
    return place_images(parsed, num_images, where)


def ends_with_the_user(prompt: list[tuple[Role, Any]]) -> bool:
    """Returns whether user and assistant turns alternate, starting and ending with the user."""
    roles = [role for role, _ in prompt if role != "system"]
    alternating = [("user", "assistant")[n % 2] for n in range(len(roles))]
    return roles == alternating and len(roles) % 2 == 1


def conversation_images(obj: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Returns the images of a record, from `image` (LLaVA) or `images` (ShareGPT).

    Raises:
        RecordError: They are not paths, or both fields are present.
    """
    if obj.get("image") and obj.get("images"):
        raise RecordError("wrong-type", f"{where}: fields 'image' and 'images' are both present; keep one")
    name = "image" if obj.get("image") or obj.get("images") is None else "images"
    value = obj.get(name)
    return () if value is None or value == "" else image_paths(value, name, where)


def conversation_turns(obj: Mapping[str, Any], where: str) -> list[tuple[Role, Any]]:
    """Returns (role, text or list of parts) of every turn; a `system` field becomes the first turn.

    Raises:
        RecordError: The turns are malformed.
    """
    name = "messages" if "messages" in obj else "conversations"
    value = obj.get(name)
    if not isinstance(value, list):
        raise RecordError(
            "wrong-type", f"{where}: field '{name}' must be a list of turns, each with 'from' and 'value'"
        )
    turns = [conversation_turn(turn, f"{name}[{number}]", where) for number, turn in enumerate(value)]
    if obj.get("system"):
        turns.insert(0, ("system", text_of(obj["system"], "field 'system'", where)))
    return turns


def conversation_turn(turn: Any, name: str, where: str) -> tuple[Role, Any]:
    """Parses one turn: `from` and `value`, or `role` and `content`, which may be a list of parts.

    Raises:
        RecordError: The turn is malformed.
    """
    if not isinstance(turn, dict):
        raise RecordError("wrong-type", f"{where}: {name} must be an object with 'from' and 'value'")
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    speaker, content = turn.get(who), turn.get(what)
    if (isinstance(speaker, str) and speaker in TOOL_ROLES) or (content is None and turn.get("tool_calls")):
        raise RecordError(
            "unknown-role",
            f"{where}: {name} is a tool call or its result, which bpo does not train on; remove the record",
        )
    if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
        raise RecordError("unknown-role", f"{where}: {name}.{who} is {speaker!r}; it must be human, gpt or system")
    if isinstance(content, list) and what == "content":
        return ROLE_OF_SPEAKER[speaker], content
    return ROLE_OF_SPEAKER[speaker], text_of(content, f"{name}.{what}", where)


def conversation_extra(obj: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """Returns the other fields of a conversation, and those of its turns as `source_turns`.

    Raises:
        RecordError: A field cannot be written as UTF-8 JSON.
    """
    extra = extra_of(obj, known, where)
    turns = obj["messages"] if "messages" in obj else obj["conversations"]
    if any(len(turn) > 2 for turn in turns):
        extras = [turn_extra(turn, where) for turn in turns]
        if any(extras):
            extra.setdefault("source_turns", extras)
    return extra


def turn_extra(turn: Any, where: str) -> dict[str, Any]:
    """Returns the fields of a turn other than speaker and text, without nulls, which are artefacts of tables."""
    if not isinstance(turn, dict):
        return {}
    known = ("from", "value") if "from" in turn else ("role", "content")
    return {name: value for name, value in extra_of(turn, known, where, ()).items() if value is not None}
