"""Per-record values of `bpo measure`: log-probs of the completions, and n-grams that tell which answer is preferred.

The log-probs are under a model, in nats: `seeing` with the record's own images, `blind` with those of other records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bpo.bootstrap.measure.ngrams import ngrams
from bpo.records import PreferenceGroup

VALUES_ADVICE = "create the file again with `bpo measure`"
_VALUES = ("seeing", "blind")


def telling_words(preferred: str, rejected: str, telling: Mapping[str, tuple[int, int]]) -> list[list[Any]]:
    """The telling n-grams that only one of two texts has: [n-gram, pairs preferred, pairs rejected]."""
    if not telling:
        return []
    differing = {*ngrams(preferred)} ^ {*ngrams(rejected)}
    return [[ngram, *counts] for ngram, counts in telling.items() if ngram in differing]


def check_values(line: Mapping[str, Any]) -> None:
    """Validates a line of GROUPS.measures.jsonl. Raises: KeyError, TypeError."""
    for completion in line["completions"]:
        if not isinstance(completion["response"], str):
            raise TypeError("a response is not a string")
        if not all(isinstance(completion[name], int | float) and math.isfinite(completion[name]) for name in _VALUES):
            raise TypeError("a log-prob is not a finite number")


def record_margins(group: PreferenceGroup, lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float] | None]:
    """(blind preference, seeing margin) of each completion against the best; None for the best and the unmeasured."""
    values = {c["response"]: c for line in lines for c in line["completions"]}
    best = max(group.own_completions or group.completions, key=lambda completion: completion.score)
    own = values.get(best.response)
    margins: list[tuple[float, float] | None] = []
    for completion in group.completions:
        other = values.get(completion.response)
        if own is None or other is None or completion.score == best.score:
            margins.append(None)
        else:
            margins.append((round(other["blind"] - own["blind"], 2), round(own["seeing"] - other["seeing"], 2)))
    return margins
