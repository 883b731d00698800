"""Which negatives to leave out so that the sources stand in the shares that were asked for.

The paper's release held 160,000 injected errors and 20,000 answers to weakened images: whoever trains on all of it
trains mostly on the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bpo.bootstrap.seeds import derive_seed


def surplus(
    kept: Mapping[str, Sequence[str]], target_shares: Mapping[str, float], seed: int
) -> dict[str, frozenset[str]]:
    """Source -> ids of the records whose negative is left out.

    The scarcest source, for its share, keeps all; the others keep as many as fit its number. Which ones depends on
    seed, source and id alone, so that a merge gives the same groups in any order. A source without a share is not
    touched; one that made nothing bounds nobody.

    Args:
        kept: Source -> ids of the records for which it made a usable negative.
        target_shares: Source -> its share among those named; only their ratios matter.
    """
    bound = min(
        (len(kept.get(source, ())) / share for source, share in target_shares.items() if kept.get(source)), default=0.0
    )
    left_out = {}
    for source, share in target_shares.items():
        ids = sorted(kept.get(source, ()), key=lambda record_id: derive_seed(seed, "balance", source, record_id))
        left_out[source] = frozenset(ids[round(bound * share) :])
    return left_out
