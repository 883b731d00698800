"""Preference pairs in which a word tells the rejected answer, with candidates that may lack it."""

from __future__ import annotations

import numpy as np

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ade", "ilt", "orp", "ulk", "est")]


def telling_set(
    num_records: int, num_candidates: int, preferred: float, rejected: float, seed: int = 0
) -> tuple[list[str], list[str], list[list[str]]]:
    """Ids, preferred answers, candidates; `zebra` is in the given shares of preferred and of rejected answers."""
    rng = np.random.default_rng(seed)

    def sentence(share: float) -> str:
        words = [str(word) for word in rng.choice(WORDS, 6)]
        if rng.random() < share:
            words.insert(int(rng.integers(0, 6)), "zebra")
        return " ".join(words) + "."

    ids = [f"r{number}" for number in range(num_records)]
    answers = [sentence(preferred) for _ in ids]
    return ids, answers, [[sentence(rejected) for _ in range(num_candidates)] for _ in ids]


def share_with(word: str, texts: list[str], weights: np.ndarray | None = None) -> float:
    return float(np.average([word in text for text in texts], weights=weights))
