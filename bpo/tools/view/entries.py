"""What the page shows of each record, as JSON: groups with their diffs, refusals, scores. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpo.formats.lexicon import ObjectLexicon
from bpo.records import Completion, PreferenceGroup, Turn
from bpo.tools.view.diff import diff_segments, plain_segments

SCORES_ADVICE = "write the file with `bpo score`"
REFUSED_ADVICE = "remove the line"


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


def token_scores(line: Mapping[str, Any]) -> dict[str, TokenScores]:
    """Response -> scores, of one line that `bpo score` wrote.

    Raises:
        KeyError, TypeError, ValueError: The line has another form.
    """
    _ = line["id"]
    scores = {}
    for one in line["completions"]:
        tokens, policy, reference = (tuple(one[name]) for name in ("tokens", "policy", "reference"))
        if not len(tokens) == len(policy) == len(reference):
            raise ValueError("tokens, policy and reference differ in number")
        if not all(isinstance(token, str) for token in tokens) or not isinstance(one["response"], str):
            raise TypeError("a token or response is no text")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (*policy, *reference)):
            raise TypeError("a log-prob is no finite number")
        scores[one["response"]] = TokenScores(tokens, policy, reference)
    return scores


def check_refused(line: Mapping[str, Any]) -> None:
    """Raises: KeyError, TypeError: A line of refused.jsonl has another form."""
    for name in ("id", "source", "reason"):
        if not isinstance(line[name], str):
            raise TypeError(f"field {name!r} is no text")


def entry_of(
    group: PreferenceGroup,
    refused: Sequence[Mapping[str, Any]],
    scores: Mapping[str, TokenScores],
    lexicon: ObjectLexicon,
    pictures: Mapping[str, Any],
) -> dict[str, Any]:
    """One group as the page's script reads it.

    Args:
        refused: What was refused of this record.
        scores: Response -> scores.
        pictures: `images` [{path or None, name, error}], `weakened` {completion index: {paths, note}}.
    """
    best = max(group.completions, key=lambda completion: completion.score)
    completions = [_completion(c, best, lexicon, scores.get(c.response)) for c in group.completions]
    for one in completions:
        one["margin"] = _margin(one, completions)
    return {
        "id": group.id,
        "prompt": [{"role": turn.role, "text": turn_text(turn)} for turn in group.prompt],
        "completions": completions,
        "refused": [_refused(one, best.response, lexicon) for one in refused],
        "note": "" if any(c.score < best.score for c in group.completions) else "no pair: all scores are equal",
        **pictures,
    }


def refused_only(record_id: str, refused: Sequence[Mapping[str, Any]], lexicon: ObjectLexicon) -> dict[str, Any]:
    """A record of which nothing was kept."""
    return {
        "id": record_id,
        "prompt": [],
        "completions": [],
        "refused": [_refused(one, "", lexicon) for one in refused],
        "note": "no group: everything of this record was refused",
        "images": [],
        "weakened": {},
    }


def turn_text(turn: Turn) -> str:
    """The text of a turn, with `[image]` where an image stands."""
    return "".join(part.text if part.type == "text" else "[image] " for part in turn.content).strip()


def _completion(
    completion: Completion, best: Completion, lexicon: ObjectLexicon, scores: TokenScores | None
) -> dict[str, Any]:
    is_best = completion is best
    provenance = completion.provenance.to_json() if completion.provenance else {}
    # As text: a script's numbers have 53 bits.
    provenance = {name: v if isinstance(v, str) else json.dumps(v) for name, v in provenance.items()}
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


def _margin(one: Mapping[str, Any], completions: Sequence[Mapping[str, Any]]) -> float | None:
    """The least log-ratio difference, better - this one: negative where a pair is still the wrong way round."""
    if "log_ratio" not in one:
        return None
    better = [c["log_ratio"] for c in completions if c["score"] > one["score"] and "log_ratio" in c]
    return round(min(better) - one["log_ratio"], 3) if better else None


def _refused(entry: Mapping[str, Any], annotation: str, lexicon: ObjectLexicon) -> dict[str, Any]:
    text = str(entry.get("text", ""))
    segments = diff_segments(annotation, text, lexicon) if annotation and text else plain_segments(text, lexicon)
    return {
        "source": entry["source"],
        "reason": entry["reason"],
        "detail": str(entry.get("detail", "")),
        "segments": segments,
    }
