"""Importers of judged answers: several with ratings each (VLFeedback), or one with a label (KTO)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from statistics import fmean
from typing import Any

from bpo.formats.fields import answer_of, extra_of, prompt_to_json, required, score_of
from bpo.formats.importers.llava import (
    KNOWN_KEYS,
    NOT_ALTERNATING,
    conversation_extra,
    conversation_images,
    conversation_turns,
    ends_with_the_user,
    prompt_of,
)
from bpo.formats.importers.names import PROMPT_FIELDS, RATED
from bpo.formats.importers.preferences import PairRow
from bpo.formats.messages import content_text
from bpo.formats.problems import RecordError
from bpo.formats.schema import COMPLETION_KEYS, completion_extra
from bpo.records import Completion, PreferenceGroup

# Keys include 1 and 0, which equal True and False.
_LABELS = {True: 1.0, False: 0.0, -1: 0.0, "true": 1.0, "True": 1.0, "false": 0.0, "False": 0.0}


def group_from_ratings(obj: Mapping[str, Any], record_id: str, where: str) -> PreferenceGroup | str:
    """Converts a prompt with rated answers; `RATED` lists objects with `response` and `annotations` or `score`.

    The score of an answer is the mean of the `Rating` of all aspects in `annotations`, as VLFeedback's authors use it
    (arXiv 2312.10665): answers with the same mean form no pair.

    Returns:
        The group, or `NOT_ALTERNATING`.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    images = conversation_images(obj, where)
    name = next((name for name in ("messages", "conversations", *PROMPT_FIELDS) if obj.get(name) is not None), "prompt")
    value = required(obj, name, where)
    value = [{"role": "user", "content": value}] if isinstance(value, str) else value
    turns = conversation_turns({"messages": value, "system": obj.get("system")}, where)
    if not ends_with_the_user(turns):
        return NOT_ALTERNATING
    entries = required(obj, RATED, where)
    if not isinstance(entries, list) or len(entries) < 2:
        raise RecordError("few-completions", f"{where}: fewer than two rated answers; a preference needs two")
    completions = tuple(_rated(entry, f"completions[{n}]", where) for n, entry in enumerate(entries))
    extra = extra_of(obj, {"id", "image", "images", "system", name, RATED}, where)
    return PreferenceGroup(record_id, images, prompt_of(turns, len(images), where), completions, extra)


def _rated(entry: Any, name: str, where: str) -> Completion:
    if not isinstance(entry, dict):
        raise RecordError("wrong-type", f"{where}: {name} must be an object with 'response' and 'annotations'")
    text = answer_of(required(entry, "response", f"{where}: {name}"), f"{name}.response", where)
    if "rank" in entry:
        raise RecordError(
            "invalid-score",
            f"{where}: a ranking does not tell which end is best; write 'scores', of which higher ones are preferred",
        )
    if entry.get("score") is not None:
        score = score_of(entry["score"], f"{name}.score", where)
    else:
        score = _mean_rating(entry.get("annotations"), name, where)
    return Completion(text, score, "rated", None, extra_of(entry, ("response", "score"), where, COMPLETION_KEYS))


def _mean_rating(annotations: Any, name: str, where: str) -> float:
    aspects = annotations if isinstance(annotations, dict) else {}
    ratings = []
    for aspect, judged in aspects.items():
        rating = judged.get("Rating", judged.get("rating")) if isinstance(judged, dict) else judged
        if isinstance(rating, str):
            with suppress(ValueError):  # refused below
                rating = float(rating)
        ratings.append(score_of(rating, f"the rating of {name}.annotations[{aspect!r}]", where))
    if not ratings:
        raise RecordError(
            "invalid-score",
            f"{where}: {name} has neither 'score' nor ratings ('annotations': {{aspect: {{'Rating': ...}}}}); rate it",
        )
    return fmean(ratings)


def row_from_label(obj: Mapping[str, Any], record_id: str, where: str) -> PairRow | str:
    """Converts one answer with `label` (KTO): true for a desirable answer, false for an undesirable one.

    Rows with the same prompt and images become one group, wherever they are; its id is derived from them.

    Returns:
        The row, or `NOT_ALTERNATING`.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    label = required(obj, "label", where)
    if not isinstance(label, (int, float, str)) or label not in _LABELS:
        raise RecordError(
            "wrong-type",
            f"{where}: field 'label' is {label!r}; in KTO's form it is true or false: rename or remove another label",
        )
    images, turns = conversation_images(obj, where), conversation_turns(obj, where)
    if not turns or turns[-1][0] != "assistant" or not ends_with_the_user(turns[:-1]):
        return NOT_ALTERNATING
    prompt = prompt_of(turns[:-1], len(images), where)
    answer = answer_of(content_text(turns[-1][1], "the answer", where), "the answer", where)
    key = json.dumps([images, prompt_to_json(prompt)]).encode()
    extra = conversation_extra(obj, KNOWN_KEYS | {"label"}, where)
    if obj.get("id") is not None:
        extra["source_id"] = record_id
    kind = "desirable" if _LABELS[label] else "undesirable"
    completion = Completion(answer, _LABELS[label], kind, None, completion_extra(extra))
    group_id = f"prompt-{hashlib.blake2b(key, digest_size=8).hexdigest()}"
    return PairRow(PreferenceGroup(group_id, images, prompt, (completion,)))
