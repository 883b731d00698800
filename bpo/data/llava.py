"""LLaVA conversation records (`id`, `image`, `conversations` of `from` and `value`) as annotations."""

from __future__ import annotations

from typing import Any

from bpo.data.markers import place_images
from bpo.records import Annotation, Role

ROLE_OF_SPEAKER: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TEXT_ONLY = "text only"
NO_ANSWER = "no answer"
NOT_ALTERNATING = "turns do not alternate"


def annotation_from_llava(obj: dict[str, Any], record_id: str, where: str) -> Annotation | str:
    """The annotation in one record, or the reason why there is none.

    The last `gpt` turn is the response; every turn before it is the prompt, answers of earlier turns included, and
    turns after it are left out. So a conversation of n answers gives one annotation, in its full context.
    The `<image>` markers are read as `bpo.data.markers.place_images` says.

    Args:
        obj: The record.
        record_id: Its id.
        where: File, record and id, for messages.

    Returns:
        The annotation, or `TEXT_ONLY`, `NO_ANSWER` (no `gpt` turn, or an empty one) or `NOT_ALTERNATING` (user and
        answer do not take turns, beginning with the user).

    Raises:
        ValueError: The record has another shape; names `where`, the field and the fix.
    """
    images = _images(obj.get("image"), where)
    turns = _turns(obj.get("conversations"), where)
    if not images:
        return TEXT_ONLY
    last = max((n for n, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    if last < 0 or not turns[last][1].strip():
        return NO_ANSWER
    prompt, response = turns[:last], turns[last][1]
    spoken = [role for role, _ in prompt if role != "system"]
    alternating = [("user", "assistant")[n % 2] for n in range(len(spoken))]
    if spoken != alternating or len(spoken) % 2 == 0:
        return NOT_ALTERNATING
    return Annotation(record_id, images, place_images(prompt, len(images)), response.strip())


def _images(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{where}: field 'image' is {value!r}; it must be a path or a list of paths")
    return tuple(paths)


def _turns(value: Any, where: str) -> list[tuple[Role, str]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: field 'conversations' must be a list of turns, each with 'from' and 'value'")
    turns: list[tuple[Role, str]] = []
    for number, turn in enumerate(value):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: {name} must be an object with 'from' and 'value'")
        speaker, text = turn.get("from"), turn.get("value")
        if speaker not in ROLE_OF_SPEAKER:
            raise ValueError(f"{where}: {name}.from is {speaker!r}; it must be human, gpt or system")
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name}.value is {type(text).__name__}, not text; quote it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {name}.value holds half a surrogate pair; remove it") from error
        turns.append((ROLE_OF_SPEAKER[speaker], text))
    return turns
