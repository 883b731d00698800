"""Canonical field names, and the fields of preference data that no annotation may have.

`canonical` maps the names of public data sets to those that the importers read. A name is mapped only if the record
lacks the canonical one, and records in bpo's own formats are left as they are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from bpo.formats.importers.llava import ROLE_OF_SPEAKER
from bpo.formats.messages import turns_of_columns

TURN_FIELDS = ("conversations", "messages")
PROMPT_FIELDS = ("prompt", "question")
ANSWER_FIELDS = ("response", "answer", "output", "completion")
RATED = "rated_completions"  # made by `canonical`: a list of {"response", and "annotations", "score" or "rank"}
_LISTS_OF_ANSWERS = ("responses", "answers", "outputs", "candidates", "completions")
_LISTS_OF_SCORES = {"scores": "score", "ratings": "score", "rewards": "score"} | dict.fromkeys(
    ("ranking", "rankings", "ranks", "rank"), "rank"
)
_KIND = "(?:_(?:response|answer|output|completion|caption|text|messages?|conversations?))?"
_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(f"(?:chosen|preferred|winning){_KIND}"), "chosen"),
    (re.compile(f"(?:rejected|reject|dispreferred|non_?preferred|losing){_KIND}"), "rejected"),
    (re.compile("(?:img|image)_(?:path|file|filename|name|bytes|url)|img|file_?name|jpe?g|png|webp"), "image"),
    (re.compile("(?:img|image)_(?:paths|files|filenames|names|urls|list)|imgs"), "images"),
    (re.compile("label|kto_tag"), "label"),
    (re.compile("system_prompt"), "system"),
)
# Names that only preference data use, in a record or a turn.
_PREFERENCE = re.compile(
    r"reject|chosen|prefer|^(?:label|kto_tag)$|^rank(?:ing|ings|s)?$|^(?:winner|winning|loser|losing)|^(?:score|rating|reward)s?$"
    r"|^(?:model_)?(?:output|response|completion|answer)_?(?:\d+|[ab])$"
    r"|^(?:better|worse|best|worst|negative|hallucinated)_(?:output|response|completion|answer|caption|text)"
)


def canonical(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the record with canonical field names and conversations as lists of turns.

    - `chosen_response`, `rejected_messages`, `reject`, ... become `chosen` and `rejected`;
    - `query` or `instruction`, with `input`, becomes `question`, if there is no other prompt;
    - `history` and `system`, or an answer next to `rejected` or `label`, form `messages` with the prompt;
    - turns as JSON text, and `from` and `value` in answers, become turns with `role` and `content`;
    - answers with ratings or scores in lists become `RATED`.
    """
    is_text = any(isinstance(record.get(name), str) for name in TURN_FIELDS)
    if _is_own(record) or not (is_text or _has_other_names(tuple(record))):
        return record
    fields = {name: _decoded_turns(value) if name in _TEXT_OF_TURNS else value for name, value in record.items()}
    for name in ("chosen", "rejected", "label"):
        if name in fields and fields[name] is None:
            del fields[name]
    for key in record:
        name = _name_of(key)
        if name != key and _has(fields, key) and not _has(fields, name):
            fields[name] = fields.pop(key)
    if not any(_has(fields, name) for name in (*TURN_FIELDS, *PROMPT_FIELDS)):
        _name_prompt(fields)
    for name in ("prompt", "chosen", "rejected"):
        value = turns_of_columns(fields.get(name))
        if isinstance(value, (dict, list)):
            fields[name] = [_with_role(turn) for turn in value] if isinstance(value, list) else _with_role(value)
    if fields.get("rejected_images") in (None, [], fields.get("images", fields.get("image"))):
        fields.pop("rejected_images", None)
    _join_turns(fields)
    _collect_ratings(fields)
    return fields


def preference_field(record: Mapping[str, Any]) -> str | None:
    """Returns the name of a field of the record or of a turn that only preference data have, if one has a value."""
    turns = [turn for name in TURN_FIELDS for turn in _as_list(_decoded_turns(record.get(name)))]
    for fields in (record, *turns):
        for name in _preference_names(tuple(fields)) if isinstance(fields, Mapping) else ():
            if fields[name] not in (None, "", [], {}):
                return name
    return None


def object_hint(value: Mapping[str, Any]) -> str:
    """Returns what an object that contains all records, or lists files of them, is, with the fix; otherwise ""."""
    name, first = next(iter(value.items()), ("", None))
    inner = first[0] if isinstance(first, list) and first else first
    if not isinstance(inner, dict):
        return ""
    if isinstance(first, list):
        return f"the records are in the list {name!r} of one object; write this list alone: jq '.[{json.dumps(name)}]'"
    if isinstance(inner.get("annotation"), str):
        return f"this file lists other files; give the file of records, such as {inner['annotation']!r}"
    return f"the records are the values of one object, with {name!r} as a key; write a list of them: jq '[.[]]'"


_CHANGED = frozenset(
    (*PROMPT_FIELDS, "chosen", "rejected", "rejected_images", "label", "message", "query", "instruction", "input")
) | frozenset((*_LISTS_OF_ANSWERS,))
_TEXT_OF_TURNS = frozenset((*TURN_FIELDS, "message", "prompt", "chosen", "rejected"))


def _is_own(record: Mapping[str, Any]) -> bool:
    """Returns whether the record is a group or an annotation as bpo and the paper write them."""
    completions = record.get("completions")
    if isinstance(completions, list):
        return bool(completions) and isinstance(completions[0], dict) and "score" in completions[0]
    return isinstance(record.get("prompt"), list) and "response" in record


@functools.lru_cache(maxsize=4096)
def _name_of(field: str) -> str:
    snake = _snake_case(field)
    return next((name for pattern, name in _NAMES if pattern.fullmatch(snake)), field)


# The two below are cached by all names of a record, which are mostly the same throughout a file.
@functools.lru_cache(maxsize=256)
def _has_other_names(fields: tuple[str, ...]) -> bool:
    """Returns whether `canonical` may have to change a record with these fields."""
    return any(name in _CHANGED or _name_of(name) != name for name in fields)


@functools.lru_cache(maxsize=256)
def _preference_names(fields: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in fields if _PREFERENCE.search(_snake_case(name)))


def _snake_case(field: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[ -]", "_", field).lower()


def _has(fields: Mapping[str, Any], name: str) -> bool:
    names = ("image", "images") if name in ("image", "images") else (name,)
    return any(fields.get(name) is not None for name in names)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _decoded_turns(value: Any) -> Any:
    """Returns the turns of a conversation stored as JSON text; any other value unchanged."""
    if not (isinstance(value, str) and value.startswith("[") and ('"role"' in value or '"from"' in value)):
        return value
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return (
        turns if turns and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns) else value
    )


def _with_role(turn: Any) -> Any:
    """Returns a turn with `from` and `value` as one with `role` and `content`."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys() or {"role", "content"} & turn.keys():
        return turn
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker = turn["from"]
    role = ROLE_OF_SPEAKER.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": turn["value"]} | others


def _name_prompt(fields: dict[str, Any]) -> None:
    """Renames the prompt: turns under `message` or in `input`, or the text of an instruction and its input."""
    if isinstance(fields.get("message"), list):
        fields["prompt"] = fields.pop("message")
    elif isinstance(fields.get("input"), dict) and "messages" in fields["input"]:  # OpenAI's preference data
        fields["messages"] = fields.pop("input")["messages"]
    else:
        names = [name for name in ("query", "instruction", "input") if isinstance(fields.get(name), str)]
        texts = [text for text in (fields.pop(name) for name in names) if text]
        if names:
            fields["question"] = "\n".join(texts)


def _join_turns(fields: dict[str, Any]) -> None:
    """Joins a prompt with its history and system prompt and, for an answer without `chosen`, with that answer."""
    prompt = next((name for name in PROMPT_FIELDS if fields.get(name) is not None), None)
    if prompt is None or any(name in fields for name in TURN_FIELDS):
        return
    begin, chosen = _beginning(fields), fields.get("chosen")
    end: list[Any] = []
    is_turns = isinstance(fields[prompt], list)
    if chosen is None:
        if not (begin or is_turns or any(_has(fields, name) for name in ("rejected", "label"))):
            return
        answer = next((name for name in ANSWER_FIELDS if fields.get(name) is not None), None)
        if answer is None:
            return
        text = fields.pop(answer)
        end = text if isinstance(text, list) else [{"role": "assistant", "content": text}]
    elif not begin:
        return
    for name in ("history", "system"):
        fields.pop(name, None)
    if isinstance(chosen, list) and len(chosen) > 1:  # both answers are whole conversations, which contain the prompt
        for name in ("chosen", "rejected"):
            fields[name] = begin + fields[name] if isinstance(fields.get(name), list) else fields.get(name)
        return
    turns = fields.pop(prompt)
    fields["messages"] = begin + (turns if is_turns else [{"role": "user", "content": turns}]) + end


def _beginning(fields: Mapping[str, Any]) -> list[Any]:
    """Returns the turns before the prompt: `system`, and `history` as turns or as pairs of question and answer."""
    system, history = fields.get("system"), fields.get("history") or []
    turns: list[Any] = [{"role": "system", "content": system}] if system else []
    for entry in history if isinstance(history, list) else [history]:
        if isinstance(entry, list) and len(entry) == 2:
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), entry, strict=True)]
        else:  # a turn, or something that is reported when the turns are read
            turns.append(entry)
    return turns


def _collect_ratings(fields: dict[str, Any]) -> None:
    """Gathers answers and their ratings, whether stored as a list of objects or as parallel lists."""
    completions = fields.get("completions")
    if isinstance(completions, dict) and isinstance(completions.get("response"), list):
        columns = {name: column for name, column in completions.items() if isinstance(column, list)}
        rows = zip_longest(*columns.values())
        fields[RATED] = [dict(zip(columns, row, strict=True)) for row in rows]
        del fields["completions"]
    elif isinstance(completions, list) and any(isinstance(c, dict) and "annotations" in c for c in completions):
        fields[RATED] = fields.pop("completions")
    else:
        answers = next((name for name in _LISTS_OF_ANSWERS if isinstance(fields.get(name), list)), None)
        scores = next((name for name in _LISTS_OF_SCORES if isinstance(fields.get(name), list)), None)
        if answers is None or scores is None or not all(isinstance(text, str) for text in fields[answers]):
            return
        kind = _LISTS_OF_SCORES[scores]
        pairs = zip_longest(fields.pop(answers), fields.pop(scores))
        fields[RATED] = [{"response": response, kind: score} for response, score in pairs]
