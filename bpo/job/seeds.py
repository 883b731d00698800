"""Seeds derived from names: random draws for a record depend on the record, not on when or where they are made."""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *names: str | int) -> int:
    """The seed of `names` under `seed`: the first 53 bits of SHA-256 of both as JSON.

    Every JSON parser represents 53-bit integers exactly, and every server's seed field accepts them.
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode("utf-8")).digest()
    return int.from_bytes(digest[:7], "big") >> 3
