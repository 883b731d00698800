"""Seeds by name: what is drawn for a record depends on the record, never on when or where it is drawn."""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for the thing called `names` under `seed`: the first 53 bits of SHA-256 of both as JSON.

    53 bits survive in any reader of JSON numbers, and every server's seed field takes them.
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode("utf-8")).digest()
    return int.from_bytes(digest[:7], "big") >> 3
