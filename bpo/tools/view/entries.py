"""Page entries as JSON: groups with diffs, refused completions and scores. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpo.formats.lexicon import ObjectLexicon
from bpo.records import Completion, PreferenceGroup, Turn
from bpo.tools.measures import TypeMeasures
from bpo.tools.view.diff import diff_segments, plain_segments
from bpo.tools.view.measures import record_margins, telling_words

SCORES_ADVICE = "create the file with `bpo score`"
REFUSED_ADVICE = "remove the line"


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token log-probs of one completion, as written by `bpo score`.

    tokens: text of each response token, including the end-of-sequence token.
    policy, reference: natural log-probs, one per token.
    """

    tokens: tuple[str, ...]
    policy: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def log_ratios(self) -> list[float]:
        return [a - b for a, b in zip(self.policy, self.reference, strict=True)]


def token_scores(line: Mapping[str, Any]) -> dict[str, TokenScores]:
    """Response -> scores, from one line written by `bpo score`.

    Raises:
        KeyError, TypeError, ValueError: The line has an unexpected format.
    """
    _ = line["id"]
    scores = {}
    for completion in line["completions"]:
        tokens, policy, reference = (tuple(completion[name]) for name in ("tokens", "policy", "reference"))
        if not len(tokens) == len(policy) == len(reference):
            raise ValueError("tokens, policy and reference differ in length")
        if not all(isinstance(token, str) for token in tokens) or not isinstance(completion["response"], str):
            raise TypeError("a token or response is not a string")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (*policy, *reference)):
            raise TypeError("a log-prob is not a finite number")
        scores[completion["response"]] = TokenScores(tokens, policy, reference)
    return scores


def check_refused(line: Mapping[str, Any]) -> None:
    """Validates a line of refused.jsonl. Raises: KeyError, TypeError."""
    for name in ("id", "source", "reason"):
        if not isinstance(line[name], str):
            raise TypeError(f"field {name!r} is not a string")


def entry_of(
    group: PreferenceGroup,
    refused: Sequence[Mapping[str, Any]],
    scores: Mapping[str, TokenScores],
    lexicon: ObjectLexicon,
    pictures: Mapping[str, Any],
    values: Sequence[Mapping[str, Any]] = (),
    measures: Mapping[str, TypeMeasures] | None = None,
) -> dict[str, Any]:
    """The page entry of a group.

    Args:
        refused: Refused completions of this record.
        scores: Response -> scores.
        pictures: `images` [{path or None, name, error}], `weakened` {completion index: {paths, note}}.
        values: Log-probs of this record, from `bpo measure`.
        measures: Type -> measures, whose telling n-grams are shown.
    """
    best = max(group.own_completions or group.completions, key=lambda completion: completion.score)
    completions = [_completion(c, best, lexicon, scores.get(c.response)) for c in group.completions]
    for completion in completions:
        completion["margin"] = _margin(completion, completions)
    _add_measures(completions, group, values, measures or {})
    return {
        "id": group.id,
        "prompt": [{"role": turn.role, "text": turn_text(turn)} for turn in group.prompt],
        "completions": completions,
        "refused": [_refused(line, best.response, lexicon) for line in refused],
        "note": "" if any(c.score < best.score for c in group.own_completions) else "no pair: all scores are equal",
        **pictures,
    }


def refused_only(record_id: str, refused: Sequence[Mapping[str, Any]], lexicon: ObjectLexicon) -> dict[str, Any]:
    """The page entry of a record without kept completions."""
    return {
        "id": record_id,
        "prompt": [],
        "completions": [],
        "refused": [_refused(line, "", lexicon) for line in refused],
        "note": "no group: all completions of this record were refused",
        "images": [],
        "weakened": {},
    }


def turn_text(turn: Turn) -> str:
    """The text of a turn, with `[image]` for each image."""
    return "".join(part.text if part.type == "text" else "[image] " for part in turn.content).strip()


def _completion(
    completion: Completion, best: Completion, lexicon: ObjectLexicon, scores: TokenScores | None
) -> dict[str, Any]:
    is_best = completion is best
    provenance = completion.provenance.to_json() if completion.provenance else {}
    # As strings: JavaScript numbers have 53 bits.
    provenance = {name: v if isinstance(v, str) else json.dumps(v) for name, v in provenance.items()}
    if completion.weight != 1:
        provenance["weight"] = f"{completion.weight:.3g}"
    tree: dict[str, Any] = {
        "type": completion.type,
        "source": provenance.pop("source", ""),
        "score": completion.score,
        "best": completion.score == best.score,
        "words": len(completion.response.split()),
        "segments": plain_segments(completion.response, lexicon)
        if is_best
        else diff_segments(best.response, completion.response, lexicon),
        "provenance": provenance,
    }
    if scores is not None:
        ratios = scores.log_ratios
        tree["tokens"] = [[text, round(ratio, 3)] for text, ratio in zip(scores.tokens, ratios, strict=True)]
        tree["log_ratio"] = round(sum(ratios), 3)
    return tree


def _add_measures(
    trees: Sequence[dict[str, Any]],
    group: PreferenceGroup,
    values: Sequence[Mapping[str, Any]],
    measures: Mapping[str, TypeMeasures],
) -> None:
    """Adds `blind`, `seeing` and `telling` to the completions that have them."""
    best = max(group.own_completions or group.completions, key=lambda completion: completion.score)
    for tree, completion, margins in zip(trees, group.completions, record_margins(group, values), strict=True):
        if margins is not None:
            tree["blind"], tree["seeing"] = margins
        if completion.score < best.score and completion.type in measures:
            telling = telling_words(best.response, completion.response, measures[completion.type].telling)
            if telling:
                tree["telling"] = telling


def _margin(completion: Mapping[str, Any], completions: Sequence[Mapping[str, Any]]) -> float | None:
    """Smallest log-ratio difference to a better completion, better - this; negative if a pair is ranked wrongly."""
    if "log_ratio" not in completion:
        return None
    better = [c["log_ratio"] for c in completions if c["score"] > completion["score"] and "log_ratio" in c]
    return round(min(better) - completion["log_ratio"], 3) if better else None


def _refused(entry: Mapping[str, Any], annotation: str, lexicon: ObjectLexicon) -> dict[str, Any]:
    text = str(entry.get("text", ""))
    segments = diff_segments(annotation, text, lexicon) if annotation and text else plain_segments(text, lexicon)
    return {
        "source": entry["source"],
        "reason": entry["reason"],
        "detail": str(entry.get("detail", "")),
        "segments": segments,
    }
