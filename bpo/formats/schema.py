"""JSON schemas of bpo's records and of the paper's released groups. Unknown fields are kept in `extra`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bpo.formats.fields import (
    answer_of,
    check_json,
    extra_of,
    id_text,
    image_paths,
    prompt_to_json,
    prompt_turns,
    refuse_unknown,
    required,
    score_of,
    text_of,
    weight_of,
)
from bpo.formats.importers.llava import NO_ANSWER
from bpo.formats.problems import RecordError
from bpo.records import Annotation, Completion, PreferenceGroup, Provenance

GROUP_KEYS = frozenset(("id", "images", "image", "prompt", "completions"))
COMPLETION_KEYS = frozenset(("response", "score", "type", "provenance", "weight"))
ANNOTATION_KEYS = frozenset(("id", "images", "image", "prompt", "response"))
PROVENANCE_KEYS = tuple(entry.name for entry in fields(Provenance))


def group_to_json(group: PreferenceGroup) -> dict[str, Any]:
    """Returns a group as a JSON object; the inverse of `group_from_json`."""
    completions = [completion_to_json(completion) for completion in group.completions]
    known = {"id": group.id, "images": list(group.images), "prompt": prompt_to_json(group.prompt)}
    return {**known, "completions": completions, **group.extra}


def completion_to_json(completion: Completion) -> dict[str, Any]:
    entry: dict[str, Any] = {"response": completion.response, "score": completion.score, "type": completion.type}
    if completion.provenance is not None:
        entry["provenance"] = completion.provenance.to_json()
    if completion.weight != 1:
        entry["weight"] = completion.weight
    return {**entry, **completion.extra}


def group_from_json(obj: Any, where: str) -> PreferenceGroup:
    """Parses one group of `groups.jsonl`.

    Args:
        obj: The parsed line.
        where: File and line, for messages.

    Raises:
        RecordError: Names `where`, the id, the field and the fix.
    """
    if not isinstance(obj, dict):
        raise RecordError("not-an-object", f"{where}: a group is {type(obj).__name__}, not an object; write {{...}}")
    if obj.get("id") is None:
        raise RecordError("missing-field", f"{where}: field 'id' is missing; give every group a unique id")
    group_id = id_text(obj["id"], where)
    where = f"{where} (id {group_id!r})"
    images = _images(obj, where)
    prompt = prompt_turns(required(obj, "prompt", where), len(images), where)
    return PreferenceGroup(group_id, images, prompt, _completions(obj, where), extra_of(obj, GROUP_KEYS, where))


def group_from_paper(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup:
    """Parses one group in the paper's released schema.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    images = _images(obj, where)
    prompt = prompt_turns(required(obj, "prompt", where), len(images), where)
    return PreferenceGroup(record_id, images, prompt, _completions(obj, where), extra_of(obj, GROUP_KEYS, where))


def annotation_to_json(annotation: Annotation) -> dict[str, Any]:
    """Returns an annotation as a JSON object; the inverse of `annotation_from_json`."""
    known = {"id": annotation.id, "images": list(annotation.images), "prompt": prompt_to_json(annotation.prompt)}
    return {**known, "response": annotation.response, **annotation.extra}


def annotation_from_json(obj: Mapping[str, Any], record_id: str, where: str) -> Annotation | str:
    """Parses one annotation in bpo's format: `id`, `images`, `prompt` as in a group, and `response`.

    Returns:
        The annotation, or `NO_ANSWER`. Annotations without images are left to the stages.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    images = _images(obj, where)
    prompt = prompt_turns(required(obj, "prompt", where), len(images), where)
    response = text_of(required(obj, "response", where), "field 'response'", where)
    if not response.strip():
        return NO_ANSWER
    return Annotation(record_id, images, prompt, response, extra_of(obj, ANNOTATION_KEYS, where))


def completion_from_json(entry: Any, name: str, where: str) -> Completion:
    """Parses one completion of a group.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    if not isinstance(entry, dict):
        raise RecordError("wrong-type", f"{where}: {name} must be an object with 'response', 'score' and 'type'")
    response = answer_of(required(entry, "response", f"{where}: {name}"), f"{name}.response", where)
    score = score_of(required(entry, "score", f"{where}: {name}"), f"{name}.score", where)
    kind = text_of(required(entry, "type", f"{where}: {name}"), f"{name}.type", where)
    provenance = entry.get("provenance")
    if provenance is not None:
        provenance = provenance_from_json(provenance, f"{name}.provenance", where)
    extra = extra_of(entry, COMPLETION_KEYS, where, ())
    return Completion(response, score, kind, provenance, extra, weight_from_json(entry, name, where))


def completion_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of another format's answer, to be kept with the completion: a name of its own becomes `source_NAME`."""
    return {f"source_{name}" if name in COMPLETION_KEYS else name: value for name, value in extra.items()}


def weight_from_json(entry: Mapping[str, Any], name: str, where: str) -> float:
    """Returns the weight of a completion, 1 if it has none; raises `RecordError` as `weight_of`."""
    value = entry.get("weight")
    return 1.0 if value is None else weight_of(value, f"{name}.weight", where)


def provenance_from_json(value: Any, name: str, where: str) -> Provenance:
    """Parses a provenance; raises `RecordError` unless it is an object with a text `source` and known keys."""
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        raise RecordError("wrong-type", f"{where}: {name} must be an object with a text 'source'")
    refuse_unknown(value, PROVENANCE_KEYS, where)
    check_json(value, name, where)
    return Provenance(**value)


def _completions(obj: Mapping[str, Any], where: str) -> tuple[Completion, ...]:
    entries = required(obj, "completions", where)
    if not isinstance(entries, list) or len(entries) < 2:
        count = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise RecordError(
            "few-completions", f"{where}: field 'completions' has {count}; a preference needs a list of at least two"
        )
    return tuple(completion_from_json(entry, f"completions[{n}]", where) for n, entry in enumerate(entries))


def _images(obj: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "images" in obj and "image" in obj:
        raise RecordError("wrong-type", f"{where}: fields 'image' and 'images' are both present; keep one")
    return image_paths(obj.get("images", obj.get("image")), "images", where)
