"""Parts of the annotations, drawn by the hash of their ids: a record's part does not depend on the others."""

from __future__ import annotations

from bpo.job.seeds import derive_seed


def in_part(record_id: str, part: str) -> bool:
    """Whether a record is in a part.

    Args:
        part: `data.part`, K/N: the K-th of N disjoint parts of about the same size; empty is all.
    """
    if not part:
        return True
    number, count = (int(value) for value in part.split("/"))
    return derive_seed(0, "part", record_id) % count == number - 1
