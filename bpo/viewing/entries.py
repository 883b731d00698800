"""What the page shows of each record, as JSON: groups with their diffs, refusals, scores. Pure functions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo.data.lexicon import ObjectLexicon
from bpo.records import Completion, PreferenceGroup, Turn
from bpo.viewing.diff import diff_segments, plain_segments


class ViewError(ValueError):
    """A file that cannot be shown; the message names it, the line and the fix."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token log-probs of one completion: what `bpo score` writes.

    tokens: text of each response token, the end of the answer included.
    policy, reference: natural log-probs, one a token.
    """

    tokens: tuple[str, ...]
    policy: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def log_ratios(self) -> list[float]:
        return [a - b for a, b in zip(self.policy, self.reference, strict=True)]


@dataclass
class Extras:
    """What belongs to records beside their groups, by record id."""

    refused: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    scores: dict[str, dict[str, TokenScores]] = field(default_factory=dict)


def entry_of(
    group: PreferenceGroup, extras: Extras, lexicon: ObjectLexicon, pictures: Mapping[str, Any]
) -> dict[str, Any]:
    """One group as the page's script reads it.

    Args:
        pictures: `image` (path in the page's folder or None), `error`, `weakened` {completion index: {path, note}}.
    """
    best = max(group.completions, key=lambda completion: completion.score)
    scores = extras.scores.get(group.id, {})
    completions = [_completion(c, best, lexicon, scores.get(c.response)) for c in group.completions]
    return {
        "id": group.id,
        "files": list(group.images),
        "prompt": [{"role": turn.role, "text": turn_text(turn)} for turn in group.prompt],
        "completions": completions,
        "refused": [_refused(one, best.response, lexicon) for one in extras.refused.get(group.id, ())],
        "margin": _margin(completions),
        **pictures,
    }


def refused_only(record_id: str, extras: Extras, lexicon: ObjectLexicon) -> dict[str, Any]:
    """A record of which nothing was kept."""
    return {
        "id": record_id,
        "files": [],
        "prompt": [],
        "completions": [],
        "refused": [_refused(one, "", lexicon) for one in extras.refused[record_id]],
        "margin": None,
        "image": None,
        "error": "no group: everything of this record was refused",
        "weakened": {},
    }


def turn_text(turn: Turn) -> str:
    """The text of a turn, with `[image]` where an image stands."""
    return "".join(part.text if part.type == "text" else "[image] " for part in turn.content).strip()


def _completion(
    completion: Completion, best: Completion, lexicon: ObjectLexicon, scores: TokenScores | None
) -> dict[str, Any]:
    is_best = completion is best
    tree: dict[str, Any] = {
        "type": completion.type,
        "score": completion.score,
        "words": len(completion.response.split()),
        "segments": plain_segments(completion.response, lexicon)
        if is_best
        else diff_segments(best.response, completion.response, lexicon),
        "provenance": completion.provenance.to_json() if completion.provenance else {},
    }
    if scores is not None:
        ratios = scores.log_ratios
        tree["tokens"] = [[text, round(ratio, 3)] for text, ratio in zip(scores.tokens, ratios, strict=True)]
        tree["log_ratio"] = round(sum(ratios), 3)
    return tree


def _margin(completions: Iterable[Mapping[str, Any]]) -> float | None:
    """Smallest log-ratio difference, better - worse, of a pair: negative where one is still the wrong way round."""
    scored = [c for c in completions if "log_ratio" in c]
    margins = [a["log_ratio"] - b["log_ratio"] for a in scored for b in scored if a["score"] > b["score"]]
    return round(min(margins), 3) if margins else None


def _refused(entry: Mapping[str, Any], annotation: str, lexicon: ObjectLexicon) -> dict[str, Any]:
    text = str(entry.get("text", ""))
    segments = diff_segments(annotation, text, lexicon) if annotation else plain_segments(text, lexicon)
    return {
        "source": str(entry.get("source", "")),
        "reason": str(entry.get("reason", "")),
        "detail": str(entry.get("detail", "")),
        "segments": segments,
    }


def read_refused(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Record id -> entries of a refused.jsonl; empty where there is no such file."""
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            entry = _object(line, path, number)
            by_id[str(entry.get("id", ""))].append(entry)
    return dict(by_id)


def read_scores(path: Path) -> dict[str, dict[str, TokenScores]]:
    """Record id -> response -> scores, from the JSONL that `bpo score` writes.

    Raises:
        ViewError: a line has another form.
    """
    scores: dict[str, dict[str, TokenScores]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        entry = _object(line, path, number)
        try:
            of_record = scores.setdefault(str(entry["id"]), {})
            for one in entry["completions"]:
                parts = tuple(tuple(one[name]) for name in ("tokens", "policy", "reference"))
                if len({len(part) for part in parts}) != 1:
                    raise ValueError("tokens, policy and reference differ in number")
                of_record[one["response"]] = TokenScores(*parts)
        except (KeyError, TypeError, ValueError) as error:
            raise ViewError(f"{path}, line {number}: {error}; write the file with `bpo score`") from error
    return scores


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ViewError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
    if not isinstance(entry, dict):
        raise ViewError(f"{path}, line {number}: not an object; remove the line")
    return entry
