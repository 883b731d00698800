"""Which negatives to leave out so that the sources stand in the shares that were asked for.

The paper's release held 160,000 injected errors and 20,000 answers to weakened images: whoever trains on all of it
trains mostly on the first.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np

from bpo.bootstrap.seeds import derive_seed


def balance_rank(seed: int, source: str, record_id: str) -> int:
    """Where a negative stands in the order in which its source gives them up: the highest first. 53 bits."""
    return derive_seed(seed, "balance", source, record_id)


def thresholds(ranks: Mapping[str, array[int]], target_shares: Mapping[str, float]) -> dict[str, int]:
    """Source -> the least rank that is left out, for the sources that made too many.

    The scarcest source, for its share, keeps all; the others keep as many as fit its number. Which ones depends on
    seed, source and id alone, so that a merge gives the same groups in any order. A source without a share is not
    touched; one that made nothing bounds nobody.

    Args:
        ranks: Source -> `balance_rank` of each record for which it made a usable negative, 8 bytes each ("Q").
        target_shares: Source -> its share among those named; only their ratios matter.
    """
    bound = min((len(ranks[source]) / share for source, share in target_shares.items() if ranks[source]), default=0.0)
    left_out = {}
    for source, share in target_shares.items():
        kept = round(bound * share)
        if kept < len(ranks[source]):
            left_out[source] = int(np.partition(np.array(ranks[source], dtype=np.uint64), kept)[kept])
    return left_out
