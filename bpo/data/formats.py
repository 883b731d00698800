"""The files of preferences: `groups.jsonl`, the paper's released JSON, and LLaVA conversations as annotations.

`groups.jsonl` holds one preference group a line:

    {"id": "000000033471", "images": ["coco/train2017/000000033471.jpg"],
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
     "completions": [{"response": "A bus.", "score": 1, "type": "gt"},
                     {"response": "A tram.", "score": 0, "type": "mllm-hal", "provenance": {"source": "weaken"}}]}

`image` may replace `images` (one path or a list). A prompt may be plain text, or turns whose content is plain text: the
images then stand first and the text is only text, even where it contains `<image>`. Unknown keys are refused, so
that nothing is lost unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bpo.data.jsonfiles import JsonRecord, read_records
from bpo.data.llava import annotation_from_llava
from bpo.data.markers import IMAGE_PART, place_images
from bpo.records import ROLES, Annotation, Completion, ContentPart, PreferenceGroup, Provenance, Turn

GROUP_KEYS = ("id", "images", "image", "prompt", "completions")
COMPLETION_KEYS = ("response", "score", "type", "provenance")


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """What an annotation file gave.

    Attributes:
        annotations: The usable records, in order.
        skipped: Reason -> ids of the records that hold nothing to learn from, such as "text only".
    """

    annotations: tuple[Annotation, ...]
    skipped: Mapping[str, tuple[str, ...]]


def read_annotations(path: Path) -> AnnotationFile:
    """LLaVA conversation JSON or JSONL; see `bpo.data.llava.annotation_from_llava` for the reading of one record.

    A missing id is made from the position (`record-7`). LLaVA's own mixture repeats ids: the second bearer of
    `x` becomes `x#2`.

    Raises:
        ValueError: Names file, record, field and fix.
    """
    annotations: list[Annotation] = []
    skipped: dict[str, list[str]] = {}
    taken: set[str] = set()
    for record in read_records(path):
        if "completions" in record.value:
            raise ValueError(f"{record.where}: this is a file of preference groups; name it as data.groups")
        record_id = _unused_id(_record_id(record), taken)
        outcome = annotation_from_llava(record.value, record_id, f"{record.where} (id {record_id!r})")
        if isinstance(outcome, Annotation):
            annotations.append(outcome)
        else:
            skipped.setdefault(outcome, []).append(record_id)
    return AnnotationFile(tuple(annotations), {reason: tuple(ids) for reason, ids in skipped.items()})


def read_groups(path: Path) -> tuple[PreferenceGroup, ...]:
    """Preference groups from `groups.jsonl`, or from a JSON list in the paper's released schema.

    In a JSON list a text prompt may hold `<image>` markers (`bpo.data.markers.place_images`), ids may be missing or
    repeated (handled as in `read_annotations`) and unknown keys are ignored. In JSONL an id is required and unique.

    Raises:
        ValueError: Names file, record, field and fix.
    """
    groups: list[PreferenceGroup] = []
    taken: set[str] = set()
    for record in read_records(path):
        if "conversations" in record.value:
            raise ValueError(
                f"{record.where}: this is an annotation file; name it as data.annotations and run bpo bootstrap"
            )
        if record.from_list:
            group = _group_from_released(record, taken)
        else:
            group = group_from_json(record.value, record.where)
            if group.id in taken:
                raise ValueError(f"{record.where}: id {group.id!r} is used twice; give every group its own id")
            taken.add(group.id)
        groups.append(group)
    return tuple(groups)


def group_to_json(group: PreferenceGroup) -> dict[str, Any]:
    """The JSON object of a group; `group_from_json` gives back an equal group."""
    completions = []
    for completion in group.completions:
        entry: dict[str, Any] = {
            "response": completion.response,
            "score": completion.score,
            "type": completion.type,
        }
        if completion.provenance is not None:
            entry["provenance"] = completion.provenance.to_json()
        completions.append(entry)
    prompt = [{"role": turn.role, "content": [_part_to_json(p) for p in turn.content]} for turn in group.prompt]
    return {"id": group.id, "images": list(group.images), "prompt": prompt, "completions": completions}


def group_from_json(obj: Any, where: str) -> PreferenceGroup:
    """One group of `groups.jsonl`.

    Args:
        obj: The parsed line.
        where: File and line, for messages.

    Raises:
        ValueError: Names `where`, the id, the field and the fix.
    """
    if not isinstance(obj, dict):
        raise ValueError(f"{where}: a group is {type(obj).__name__}, not an object; write {{...}}")
    if obj.get("id") is None:
        raise ValueError(f"{where}: field 'id' is missing; give every group its own id")
    group_id = _id_text(obj["id"], where)
    where = f"{where} (id {group_id!r})"
    _refuse_unknown(obj, GROUP_KEYS, where)
    images = _images(obj, where)
    prompt = _prompt(_required(obj, "prompt", where), len(images), where)
    return PreferenceGroup(group_id, images, prompt, _completions(obj, where, strict=True))


def _group_from_released(record: JsonRecord, taken: set[str]) -> PreferenceGroup:
    group_id = _unused_id(_record_id(record), taken)
    where = f"{record.where} (id {group_id!r})"
    images = _images(record.value, where)
    prompt = _required(record.value, "prompt", where)
    if isinstance(prompt, str):
        turns = place_images([("user", _text(prompt, "prompt", where))], len(images))
    else:
        turns = _prompt(prompt, len(images), where)
    return PreferenceGroup(group_id, images, turns, _completions(record.value, where, strict=False))


def _prompt(prompt: Any, num_images: int, where: str) -> tuple[Turn, ...]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where}: field 'prompt' must be text or a non-empty list of turns")
    turns = [_turn(turn, f"prompt[{number}]", where) for number, turn in enumerate(prompt)]
    if turns[-1].role != "user":
        raise ValueError(f"{where}: field 'prompt' ends with a turn of {turns[-1].role!r}; end it with the user's")
    num_parts = sum(turn.num_images for turn in turns)
    if num_parts == 0 and num_images:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", (IMAGE_PART,) * num_images + turns[first].content)
    elif num_parts != num_images:
        raise ValueError(
            f"{where}: field 'prompt' holds {num_parts} image parts for {num_images} images; make them equal "
            "(or write no image part, and the images stand first)"
        )
    return tuple(turns)


def _turn(turn: Any, name: str, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: {name} must be an object with 'role' and 'content'")
    _refuse_unknown(turn, ("role", "content"), where)
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: {name} has role {role!r}; it must be one of {', '.join(ROLES)}")
    content = turn.get("content")
    if isinstance(content, str):
        text = _text(content, f"{name}.content", where)
        return Turn(role, (ContentPart("text", text),) if text else ())
    if not isinstance(content, list):
        raise ValueError(f"{where}: {name}.content must be text or a list of parts")
    return Turn(role, tuple(_part(part, f"{name}.content[{n}]", where) for n, part in enumerate(content)))


def _part(part: Any, name: str, where: str) -> ContentPart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        _refuse_unknown(part, ("type",), where)
        return IMAGE_PART
    if kind != "text":
        raise ValueError(
            f'{where}: {name} must be {{"type": "text", "text": ...}} or {{"type": "image"}}; '
            "the image's path stands in 'images'"
        )
    _refuse_unknown(part, ("type", "text"), where)
    return ContentPart("text", _text(part.get("text"), f"{name}.text", where))


def _part_to_json(part: ContentPart) -> dict[str, str]:
    return {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}


def _completions(obj: dict[str, Any], where: str, strict: bool) -> tuple[Completion, ...]:
    entries = _required(obj, "completions", where)
    if not isinstance(entries, list) or len(entries) < 2:
        count = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise ValueError(f"{where}: field 'completions' has {count}; a preference needs a list of at least two")
    return tuple(_completion(entry, f"completions[{n}]", where, strict) for n, entry in enumerate(entries))


def _completion(entry: Any, name: str, where: str, strict: bool) -> Completion:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {name} must be an object with 'response', 'score' and 'type'")
    if strict:
        _refuse_unknown(entry, COMPLETION_KEYS, where)
    response = _text(_required(entry, "response", f"{where}: {name}"), f"{name}.response", where)
    if not response.strip():
        raise ValueError(f"{where}: {name}.response is empty; remove the completion")
    score = _required(entry, "score", f"{where}: {name}")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= sys.float_info.max:
        raise ValueError(f"{where}: {name}.score is {score!r}; it must be a finite number (higher is preferred)")
    kind = _text(_required(entry, "type", f"{where}: {name}"), f"{name}.type", where)
    provenance = entry.get("provenance")
    if provenance is not None:
        provenance = _provenance(provenance, f"{name}.provenance", where)
    return Completion(response, float(score), kind, provenance)


def _provenance(value: Any, name: str, where: str) -> Provenance:
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        raise ValueError(f"{where}: {name} must be an object with a text 'source'")
    _refuse_unknown(value, tuple(f.name for f in fields(Provenance)), where)
    return Provenance(**value)


def _images(obj: dict[str, Any], where: str) -> tuple[str, ...]:
    if "images" in obj and "image" in obj:
        raise ValueError(f"{where}: fields 'image' and 'images' are both present; keep one")
    value = obj.get("images", obj.get("image"))
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"{where}: field 'images' is {value!r}; name image paths relative to data.image_root, or write [] for none"
        )
    return tuple(paths)


def _required(obj: dict[str, Any], key: str, where: str) -> Any:
    if obj.get(key) is None:
        raise ValueError(f"{where}: field {key!r} is missing; add it")
    return obj[key]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {type(value).__name__}, not text; quote it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {name} holds half a surrogate pair at {error.start}; remove it") from error
    return value


def _id_text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{where}: field 'id' is {value!r}; it must be text or a whole number")
    return _text(str(value), "id", where)


def _record_id(record: JsonRecord) -> str:
    value = record.value.get("id")
    return f"record-{record.index}" if value is None else _id_text(value, record.where)


def _unused_id(record_id: str, taken: set[str]) -> str:
    unused, bearer = record_id, 1
    while unused in taken:
        bearer += 1
        unused = f"{record_id}#{bearer}"
    taken.add(unused)
    return unused


def _refuse_unknown(obj: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in obj if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
