"""JSON schemas of bpo's records and of the paper's released groups. Unknown fields are kept in `extra`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from bpo.formats.fields import (
    answer_of,
    beta_of,
    check_json,
    extra_of,
    id_text,
    image_paths,
    prompt_to_json,
    prompt_turns,
    refuse_unknown,
    required,
    score_of,
    spans_of,
    text_of,
    weight_of,
)
from bpo.formats.importers.llava import NO_ANSWER
from bpo.formats.problems import RecordError
from bpo.records import Annotation, Auxiliary, Completion, PreferenceGroup, Provenance

GROUP_KEYS = frozenset(("id", "images", "image", "prompt", "completions", "other_images", "auxiliary"))
FLAGS = {"paired": True, "explored": False}  # of a completion, with their defaults
COMPLETION_KEYS = frozenset(("response", "score", "type", "provenance", "weight", "beta", "weights", "view", *FLAGS))
ANNOTATION_KEYS = frozenset(("id", "images", "image", "prompt", "response"))
PROVENANCE_KEYS = tuple(entry.name for entry in fields(Provenance))


def group_to_json(group: PreferenceGroup) -> dict[str, Any]:
    """Returns a group as a JSON object; the inverse of `group_from_json`."""
    known: dict[str, Any] = {"id": group.id, "images": list(group.images)}
    if group.other_images:
        known["other_images"] = list(group.other_images)
    known["prompt"] = prompt_to_json(group.prompt)
    known["completions"] = [completion_to_json(completion) for completion in group.completions]
    if group.auxiliary:
        known["auxiliary"] = auxiliary_to_json(group.auxiliary)
    return {**known, **group.extra}


def completion_to_json(completion: Completion) -> dict[str, Any]:
    entry: dict[str, Any] = {"response": completion.response, "score": completion.score, "type": completion.type}
    if completion.provenance is not None:
        entry["provenance"] = completion.provenance.to_json()
    entry |= factors_to_json(completion)
    if completion.view:
        entry["view"] = completion.view
    return {**entry, **completion.extra}


def factors_to_json(completion: Completion) -> dict[str, Any]:
    """Returns `weight`, `beta`, `weights` and flags, each only if it is not the default; see `factors_from_json`."""
    entry: dict[str, Any] = {}
    if completion.weight != 1:
        entry["weight"] = completion.weight
    if completion.beta != 1:
        entry["beta"] = completion.beta
    if completion.token_weights:
        entry["weights"] = [list(span) for span in completion.token_weights]
    flags = {name: getattr(completion, name) for name in FLAGS}
    return entry | {name: value for name, value in flags.items() if value != FLAGS[name]}


def auxiliary_to_json(auxiliary: Sequence[Auxiliary]) -> list[dict[str, Any]]:
    """Returns the other prompts of a group with their answers; the inverse of `auxiliary_from_json`."""
    return [{"prompt": prompt_to_json(entry.prompt), "response": entry.response} for entry in auxiliary]


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
    return _group(obj, group_id, where)


def group_from_paper(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup:
    """Parses one group in the paper's released schema.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    return _group(obj, record_id, where)


def _group(obj: Mapping[str, Any], group_id: str, where: str) -> PreferenceGroup:
    images = _images(obj, where)
    other_images = other_images_of(obj.get("other_images"), "other_images", len(images), where)
    return PreferenceGroup(
        group_id,
        images,
        prompt_turns(required(obj, "prompt", where), len(images), where, may_start=True),
        _completions(obj, where, describes_others=bool(other_images)),
        extra_of(obj, GROUP_KEYS, where),
        other_images,
        auxiliary_from_json(obj.get("auxiliary"), len(images), where),
    )


def other_images_of(value: Any, name: str, num_images: int, where: str) -> tuple[str, ...]:
    """Returns the images of the other scene of a group, empty if it has none.

    Raises:
        RecordError: They are not paths, or not as many as the group's images.
    """
    images = () if value is None or value == [] else image_paths(value, name, where)
    if images and len(images) != num_images:
        raise RecordError(
            "other-images",
            f"{where}: field {name!r} has {len(images)} images, but 'images' has {num_images}; name one for each",
        )
    return images


def auxiliary_from_json(value: Any, num_images: int, where: str) -> tuple[Auxiliary, ...]:
    """Parses other prompts about the images of a group, `[{"prompt": text or turns, "response": text}, ...]`.

    Raises:
        RecordError: Names `where`, the entry, the field and the fix.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RecordError(
            "wrong-type", f"{where}: field 'auxiliary' must be a list of objects with 'prompt', 'response'"
        )
    found = []
    for number, entry in enumerate(value):
        here = f"{where}: auxiliary[{number}]"
        if not isinstance(entry, dict):
            raise RecordError("wrong-type", f"{here} must be an object with 'prompt' and 'response'")
        refuse_unknown(entry, ("prompt", "response"), here)
        prompt = prompt_turns(required(entry, "prompt", here), num_images, here)
        found.append(Auxiliary(prompt, answer_of(required(entry, "response", here), "response", here)))
    return tuple(found)


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


def completion_from_json(entry: Any, name: str, where: str, *, describes_others: bool = False) -> Completion:
    """Parses one completion of a group.

    Args:
        describes_others: Whether the group has `other_images`, which a completion may describe.

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
    view = entry.get("view")
    if view is not None and view != "other":
        raise RecordError(
            "invalid-view",
            f'{where}: {name}.view is {view!r:.80}; write "other" if it describes other_images, or leave it out',
        )
    if view is not None and not describes_others:
        raise RecordError(
            "invalid-view", f"{where}: {name} has the view 'other', but the group has no other_images; name them"
        )
    factors = factors_from_json(entry, response, name, where)
    if view is not None and factors.get("explored"):
        raise RecordError(
            "invalid-flag", f"{where}: {name} is explored, but describes other_images; remove one of both"
        )
    return Completion(response, score, kind, provenance, extra, view=view or "", **factors)


def completion_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of another format's answer, to be kept with the completion: a name of its own becomes `source_NAME`."""
    return {f"source_{name}" if name in COMPLETION_KEYS else name: value for name, value in extra.items()}


def factors_from_json(entry: Mapping[str, Any], response: str, name: str, where: str) -> dict[str, Any]:
    """Parses `weight`, `beta`, `weights` and the flags of a completion; returns the fields of `Completion` it has.

    Raises:
        RecordError: A flag is not true or false; see also `weight_of`, `beta_of` and `spans_of`.
    """
    found: dict[str, Any] = {}
    if entry.get("weight") is not None:
        found["weight"] = weight_of(entry["weight"], f"{name}.weight", where)
    if entry.get("beta") is not None:
        found["beta"] = beta_of(entry["beta"], f"{name}.beta", where)
    if entry.get("weights") is not None:
        found["token_weights"] = spans_of(entry["weights"], response, f"{name}.weights", where)
    for flag in FLAGS:
        if entry.get(flag) is not None:
            if not isinstance(entry[flag], bool):
                raise RecordError("invalid-flag", f"{where}: {name}.{flag} is {entry[flag]!r:.80}; write true or false")
            found[flag] = entry[flag]
    return found


def provenance_from_json(value: Any, name: str, where: str) -> Provenance:
    """Parses a provenance; raises `RecordError` unless it is an object with a text `source` and known keys."""
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        raise RecordError("wrong-type", f"{where}: {name} must be an object with a text 'source'")
    refuse_unknown(value, PROVENANCE_KEYS, where)
    check_json(value, name, where)
    return Provenance(**value)


def _completions(obj: Mapping[str, Any], where: str, *, describes_others: bool) -> tuple[Completion, ...]:
    entries = required(obj, "completions", where)
    if not isinstance(entries, list) or len(entries) < 2:
        count = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise RecordError(
            "few-completions", f"{where}: field 'completions' has {count}; a preference needs a list of at least two"
        )
    return tuple(
        completion_from_json(entry, f"completions[{n}]", where, describes_others=describes_others)
        for n, entry in enumerate(entries)
    )


def _images(obj: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "images" in obj and "image" in obj:
        raise RecordError("wrong-type", f"{where}: fields 'image' and 'images' are both present; keep one")
    return image_paths(obj.get("images", obj.get("image")), "images", where)
