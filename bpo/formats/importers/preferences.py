"""Preference-pair importers: TRL, RLHF-V, RLAIF-V, ShareGPT with two answers, conversations with a rejected answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bpo.formats.embedded import OTHER_COLUMN
from bpo.formats.fields import answer_of, check_json, extra_of, id_text, prompt_turns, required, score_of, text_of
from bpo.formats.importers.llava import (
    KNOWN_KEYS,
    NOT_ALTERNATING,
    conversation_extra,
    conversation_images,
    conversation_turn,
    conversation_turns,
    ends_with_the_user,
    prompt_of,
    turn_extra,
)
from bpo.formats.importers.names import TURN_FIELDS
from bpo.formats.jsonfiles import parse_json
from bpo.formats.messages import content_text, without_nulls
from bpo.formats.problems import RecordError
from bpo.formats.schema import (
    auxiliary_from_json,
    completion_extra,
    completion_from_json,
    factors_from_json,
    other_images_of,
    provenance_from_json,
)
from bpo.records import Completion, PreferenceGroup

# Columns added to TRL's by the exporter, so that groups survive a round trip through pairs.
GROUP_META, CHOSEN_META, REJECTED_META = "bpo_group", "bpo_chosen", "bpo_rejected"
TRL_KEYS = frozenset(
    ("id", "image", "images", "prompt", "question", "chosen", "rejected")
    + (GROUP_META, CHOSEN_META, REJECTED_META, OTHER_COLUMN)
)
PAIR_KEYS = frozenset(("id", "idx", "image", "images", "question", "chosen", "rejected", "text"))


@dataclass(frozen=True, slots=True)
class PairRow:
    """One row of a group stored in several rows: a pair, or a single answer with a label.

    Attributes:
        indices: Positions of the row's completions in the group; empty if the rows give their order. The last two are
            the row's pair; before them are those of the group's other images.
        num_completions: Number of completions of the group; 0 if it is the number of rows.
    """

    group: PreferenceGroup
    indices: tuple[int, ...] = ()
    num_completions: int = 0

    @property
    def is_labelled(self) -> bool:
        return not self.num_completions


def group_from_trl(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup | PairRow | str:
    """Converts one row of TRL's preference format: `prompt`, `chosen`, `rejected` (texts or messages) and `images`.

    If the answers are whole conversations, their common messages before the last one are the prompt.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    prompt, chosen, rejected = _split_prompt(obj, where)
    if prompt is None:
        return group_from_sharegpt(obj, record_id, where)
    images = conversation_images(obj, where)
    is_exported = obj.get(GROUP_META) is not None
    turns = prompt_turns(without_nulls(prompt), len(images), where, may_start=is_exported)
    answers = [_last_answer(chosen, "chosen", where), _last_answer(rejected, "rejected", where)]
    if is_exported:
        return _pair_row(obj, images, turns, answers, where)
    completions = (Completion(answers[0], 1.0, "chosen"), Completion(answers[1], 0.0, "rejected"))
    return PreferenceGroup(record_id, images, turns, completions, extra_of(obj, TRL_KEYS, where))


def _split_prompt(obj: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Returns (prompt, chosen, rejected); the answers may repeat the prompt, continue it, or contain its only copy.

    The prompt is None if it is in a conversation.
    """
    prompt = obj.get("prompt", obj.get("question"))
    begin, chosen, rejected = _split_answers(obj, where)
    if not begin:
        if prompt is None and not any(name in obj for name in TURN_FIELDS):
            raise RecordError("missing-field", f"{where}: field 'prompt' is missing; add the question")
        return prompt, chosen, rejected
    last = begin[-1].get("content") if isinstance(begin[-1], dict) else None
    if prompt is None or prompt in (begin, last):
        return begin, chosen, rejected
    if _is_answer(begin[0]):
        return _as_turns(prompt) + begin, chosen, rejected
    raise RecordError("different-prompts", f"{where}: chosen does not start with the prompt; remove one of them")


def _split_answers(obj: Mapping[str, Any], where: str) -> tuple[list[Any], Any, Any]:
    """Returns (turns that both answers start with, chosen, rejected), each answer text or a list of one turn.

    Raises:
        RecordError: An answer is missing, or the answers differ in more than their last turn.
    """
    chosen, rejected = required(obj, "chosen", where), required(obj, "rejected", where)
    if not any(isinstance(answer, list) and len(answer) > 1 for answer in (chosen, rejected)):
        return [], chosen, rejected
    one, two = (answer if isinstance(answer, list) else [answer] for answer in (chosen, rejected))
    if one[:-1] != two[:-1]:
        number = next((n for n, turns in enumerate(zip(one, two, strict=False)) if turns[0] != turns[1]), 0)
        raise RecordError(
            "different-prompts",
            f"{where}: chosen ({len(one)} turns) and rejected ({len(two)}) differ from turn {number} on; only the last "
            "turns may differ: end both after the first turn that differs",
        )
    return one[:-1], one[-1:], two[-1:]


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "assistant"


def _as_turns(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def group_from_rlhf_v(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup:
    """Converts one row of RLAIF-V (`question`, `chosen`, `rejected`, `image`) or RLHF-V (JSON with them in `text`).

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    source: Mapping[str, Any] = obj
    if "question" not in obj:
        source = required(obj, "text", where)
        if isinstance(source, str):
            source = parse_json(text_of(source, "field 'text'", where), f"{where}, field 'text'")
        if not isinstance(source, dict):
            raise RecordError(
                "wrong-type", f"{where}: field 'text' must be a JSON object with question, chosen, rejected"
            )
    images = conversation_images(obj, where)
    question = answer_of(required(source, "question", where), "field 'question'", where)
    completions = tuple(
        Completion(answer_of(required(source, name, where), f"field {name!r}", where), score, name)
        for name, score in (("chosen", 1.0), ("rejected", 0.0))
    )
    extra = extra_of(obj, PAIR_KEYS, where) | (extra_of(source, PAIR_KEYS, where) if source is not obj else {})
    return PreferenceGroup(record_id, images, prompt_turns(question, len(images), where), completions, extra)


def group_from_sharegpt(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup | PairRow | str:
    """Converts a ShareGPT conversation with `chosen` and `rejected` turns, as in LLaMA-Factory.

    Returns:
        The group, or `NOT_ALTERNATING`.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    begin, *answers = _split_answers(obj, where)
    if obj.get("prompt") is not None or (begin and not _is_answer(begin[0])):
        return group_from_trl(obj, record_id, where)  # TRL format with an additional copy of a conversation
    images, turns = conversation_images(obj, where), conversation_turns(obj, where)
    turns += [conversation_turn(turn, f"chosen[{number}]", where) for number, turn in enumerate(begin)]
    if turns and turns[-1][0] == "assistant" and turns[-1][1] in ("", answers[0]):
        turns.pop()  # a copy of the chosen answer, or a place for it
    if not ends_with_the_user(turns):
        return NOT_ALTERNATING
    completions = []
    for name, score, value in zip(("chosen", "rejected"), (1.0, 0.0), answers, strict=True):
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        role, content = ("assistant", value) if isinstance(value, str) else conversation_turn(value, name, where)
        if role != "assistant":
            raise RecordError("unknown-role", f"{where}: {name} has the role {role!r}; it must be 'assistant'")
        text = answer_of(content_text(content, name, where), name, where)
        completions.append(Completion(text, score, name, None, completion_extra(turn_extra(value, where))))
    extra = conversation_extra(obj, KNOWN_KEYS | {"chosen", "rejected"}, where)
    return PreferenceGroup(record_id, images, prompt_of(turns, len(images), where), tuple(completions), extra)


def group_from_rejected(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup | PairRow | str:
    """Converts a conversation whose last answer is the preferred one, with `rejected` (ms-swift, POVID).

    `rejected` is a text or a turn, a list of texts, or the turns of the conversation with another last answer.

    Returns:
        The group, or `NOT_ALTERNATING`.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    if obj.get("chosen") is not None:
        return group_from_sharegpt(obj, record_id, where)
    images, turns = conversation_images(obj, where), conversation_turns(obj, where)
    if not turns or turns[-1][0] != "assistant":
        raise RecordError("missing-field", f"{where}: no answer is preferred to the rejected one; add 'chosen'")
    if not ends_with_the_user(turns[:-1]):
        return NOT_ALTERNATING
    texts = [turns[-1][1], *_rejected_contents(required(obj, "rejected", where), turns[:-1], where)]
    completions = []
    for number, content in enumerate(texts):
        name, score = ("rejected", 0.0) if number else ("chosen", 1.0)
        text = answer_of(content_text(content, name, where), name, where)
        completions.append(Completion(text, score, name))
    extra = conversation_extra(obj, KNOWN_KEYS | {"rejected"}, where)
    return PreferenceGroup(record_id, images, prompt_of(turns[:-1], len(images), where), tuple(completions), extra)


def _rejected_contents(value: Any, prompt: Sequence[Any], where: str) -> list[Any]:
    """Returns the content of each rejected answer."""
    answers = value if isinstance(value, list) else [value]
    if all(isinstance(answer, str) for answer in answers):
        return answers
    turns = [conversation_turn(turn, f"rejected[{number}]", where) for number, turn in enumerate(answers)]
    begin, (role, content) = turns[:-1], turns[-1]
    if role != "assistant":
        raise RecordError("unknown-role", f"{where}: rejected ends with the role {role!r}; it must be 'assistant'")
    if begin and begin not in (list(prompt), [turn for turn in prompt if turn[0] != "system"]):
        raise RecordError(
            "different-prompts",
            f"{where}: the conversation and the rejected one differ before their last turns; only those may: end both "
            " after the first turn that differs",
        )
    return [content]


def merge_rows(rows: Sequence[PairRow], where: str) -> PreferenceGroup:
    """Merges the rows of one group.

    Raises:
        RecordError: The rows differ in more than their completions, or a completion is missing.
    """
    first = rows[0]
    if first.is_labelled:
        return _merge_labelled(rows, where)
    completions: dict[int, Completion] = {}
    for row in rows:
        if replace(row.group, completions=first.group.completions) != first.group:
            raise RecordError(
                "rows-apart", f"{where}: rows of group {first.group.id!r} differ in prompt, images or fields"
            )
        for index, completion in zip(row.indices, row.group.completions, strict=True):
            if completions.setdefault(index, completion) != completion:
                raise RecordError(
                    "rows-apart", f"{where}: completion {index} of group {first.group.id!r} has two texts"
                )
    if sorted(completions) != list(range(first.num_completions)):
        raise RecordError(
            "rows-apart",
            f"{where}: group {first.group.id!r} has {len(completions)} of its {first.num_completions} completions; its "
            "rows must be adjacent",
        )
    return replace(first.group, completions=tuple(completions[n] for n in range(first.num_completions)))


def _merge_labelled(rows: Sequence[PairRow], where: str) -> PreferenceGroup:
    completions = tuple(completion for row in rows for completion in row.group.completions)
    if len({completion.score for completion in completions}) < 2:
        raise RecordError(
            "one-label",
            f"{where}: all {len(rows)} answers to this prompt and image are {completions[0].type}; a preference needs "
            "both labels: leave out prompts that have one",
        )
    return replace(rows[0].group, completions=completions)


def _pair_row(
    obj: Mapping[str, Any], images: tuple[str, ...], turns: Any, answers: Sequence[str], where: str
) -> PairRow:
    meta = _meta(obj, GROUP_META, where)
    other_images = other_images_of(obj.get(OTHER_COLUMN), OTHER_COLUMN, len(images), where)
    indices, completions = _others(meta, bool(other_images), where)
    for name, answer in zip((CHOSEN_META, REJECTED_META), answers, strict=True):
        entry = _meta(obj, name, where)
        provenance = entry.get("provenance")
        completions.append(
            Completion(
                answer,
                score_of(entry.get("score"), f"{name}.score", where),
                text_of(entry.get("type"), f"{name}.type", where),
                None if provenance is None else provenance_from_json(provenance, f"{name}.provenance", where),
                _object_in(entry, name, where),
                **factors_from_json(entry, answer, name, where),
            )
        )
        indices.append(_whole(entry, "index", name, where))
    extra = _object_in(meta, GROUP_META, where) | extra_of(obj, TRL_KEYS, where)
    auxiliary = auxiliary_from_json(meta.get("auxiliary"), len(images), f"{where}: {GROUP_META}")
    group_id = id_text(meta.get("id"), where)
    group = PreferenceGroup(group_id, images, turns, tuple(completions), extra, other_images, auxiliary)
    return PairRow(group, tuple(indices), _whole(meta, "completions", GROUP_META, where))


def _others(meta: Mapping[str, Any], describes_others: bool, where: str) -> tuple[list[int], list[Completion]]:
    """Returns the completions of other images or of no pair, which are in every row of a group, after their indices."""
    entries = meta.get("others", [])
    if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
        raise RecordError("wrong-type", f"{where}: {GROUP_META}.others must be a list of [index, completion]")
    name = f"{GROUP_META}.others"
    indices = [_whole({"index": index}, "index", name, where) for index, _ in entries]
    return indices, [completion_from_json(c, name, where, describes_others=describes_others) for _, c in entries]


def _meta(obj: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = required(obj, name, where)
    meta = parse_json(text_of(value, f"field {name!r}", where), f"{where}, field {name!r}")
    if not isinstance(meta, dict):
        raise RecordError("wrong-type", f"{where}: field {name!r} must be a JSON object")
    return meta


def _object_in(meta: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    extra = meta.get("extra", {})
    if not isinstance(extra, dict):
        raise RecordError("wrong-type", f"{where}: {name}.extra must be an object")
    check_json(extra, f"{name}.extra", where)
    return dict(extra)


def _whole(meta: Mapping[str, Any], key: str, name: str, where: str) -> int:
    value = meta.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError("wrong-type", f"{where}: {name}.{key} is {json.dumps(value)}; it must be an integer")
    return value


def _last_answer(value: Any, name: str, where: str) -> str:
    """Returns the text of an answer: plain text, or a single assistant message."""
    if isinstance(value, list):
        turns = without_nulls(value)
        message = turns[0] if len(turns) == 1 and isinstance(turns[0], dict) else {}
        if message.get("role") != "assistant":
            raise RecordError("turn-order", f"{where}: {name} must be a single assistant message")
        value = content_text(message.get("content"), f"{name}.content", where)
    return answer_of(value, name, where)
