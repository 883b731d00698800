"""Finding entries by key."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np

from bpo.model.reference.format import RECORD, Shard
from bpo.model.reference.index import EntryIndex


def in_memory(keys: list[bytes], first: int = 0) -> Shard:
    records = np.zeros(len(keys), dtype=RECORD)
    records["key"] = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)
    records["offset"] = np.arange(first, first + len(keys))
    records["count"] = 1
    return Shard(Path("x.index"), True, records, first + len(keys))


def test_every_key_is_found_and_no_other() -> None:
    draw = np.random.default_rng(0)
    keys = [draw.bytes(32) for _ in range(1000)]
    index = EntryIndex([in_memory(keys[:300]), in_memory([]), in_memory(keys[300:600], 300)])
    rows = index.rows(keys)
    assert (rows[600:] == -1).all()
    assert index.offset_E[rows[:600]].tolist() == list(range(600))
    assert index.shard_E[rows[:600]].tolist() == [0] * 300 + [2] * 300
    assert [index.key(row) for row in rows[:600]] == keys[:600]


def test_keys_that_share_their_first_bytes_are_told_apart() -> None:
    keys = [b"same-8by" + bytes([i]) + bytes(22) + bytes([j]) for i in range(3) for j in range(3)]
    index = EntryIndex([in_memory(keys[:-1][::-1])])
    rows = index.rows(keys)
    assert rows[-1] == -1
    assert index.offset_E[rows[:-1]].tolist() == list(range(8))[::-1]


def test_the_first_of_equal_keys_wins_and_the_others_are_counted() -> None:
    keys = [bytes([i]) * 32 for i in range(4)]
    index = EntryIndex([in_memory(keys[:3]), in_memory(keys[1:], 10)])
    assert len(index) == 4 and index.num_duplicates == 2
    assert index.offset_E[index.rows(keys)].tolist() == [0, 1, 2, 12]


def test_an_empty_store_has_nothing() -> None:
    index = EntryIndex([])
    assert len(index) == 0 and index.rows([bytes(32)]).tolist() == [-1] and index.rows([]).tolist() == []


def test_a_million_entries_in_seconds_and_sixty_bytes_each() -> None:
    count = 1_000_000
    raw = np.random.default_rng(0).bytes(32 * count)
    records = np.zeros(count, dtype=RECORD)
    records["key"] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 32)
    shard = Shard(Path("x.index"), True, records, 0)
    tracemalloc.start()
    started = time.perf_counter()
    index = EntryIndex([shard])
    seconds = time.perf_counter() - started
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == count
    assert kept_bytes < 61 * count
    assert seconds < 30  # 1 s on an idle core
