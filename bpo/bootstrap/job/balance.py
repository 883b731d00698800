"""Which negatives to drop so that the sources have the requested shares.

The paper's release contains 160,000 injected errors and 20,000 answers to weakened images: training on all of it is
training mostly on the former.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np

from bpo.job.seeds import derive_seed


def balance_rank(seed: int, source: str, record_id: str) -> int:
    """Deterministic drop priority of a negative, 53 bits; the highest is dropped first."""
    return derive_seed(seed, "balance", source, record_id)


def thresholds(ranks: Mapping[str, array[int]], target_shares: Mapping[str, float]) -> dict[str, int]:
    """Source -> the lowest rank that is dropped, for the sources with a surplus.

    The source with the fewest negatives relative to its share keeps all; the others keep a number in proportion. The
    choice depends only on seed, source and id, so a merge gives the same groups in any order. Sources without a share
    are not balanced; sources without negatives set no bound.

    Args:
        ranks: Source -> `balance_rank` of each record with a usable negative from it, 8 bytes each ("Q").
        target_shares: Source -> its share among the named sources; only the ratios matter.
    """
    bound = min((len(ranks[source]) / share for source, share in target_shares.items() if ranks[source]), default=0.0)
    left_out = {}
    for source, share in target_shares.items():
        kept = round(bound * share)
        if kept < len(ranks[source]):
            left_out[source] = int(np.partition(np.array(ranks[source], dtype=np.uint64), kept)[kept])
    return left_out
