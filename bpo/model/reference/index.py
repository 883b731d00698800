"""Key lookup in a reference store. Shape letter: E entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bpo.model.reference.format import KEY_BYTES, RECORD, Shard


class EntryIndex:
    """Index of all entries of some shards: sorted columns of 60 bytes per entry; the first of equal keys is used."""

    def __init__(self, shards: Sequence[Shard]):
        records = np.concatenate([np.zeros(0, dtype=RECORD), *(shard.records_E for shard in shards)])
        shard_of = np.repeat(np.arange(len(shards), dtype=np.uint32), [len(shard.records_E) for shard in shards])
        words = _words(records["key"])
        order = np.lexsort(words.T[::-1])  # stable, first word first
        words = words[order]
        if len(words):
            is_first = np.concatenate([[True], (words[1:] != words[:-1]).any(axis=1)])
            words, order = words[is_first], order[is_first]
        self.num_duplicates = len(records) - len(order)
        self._words_E4 = words
        self._first_word_E = np.ascontiguousarray(words[:, 0])
        self.shard_E = shard_of[order]
        self.offset_E, self.count_E, self.crc_E = (records[name][order] for name in ("offset", "count", "crc"))

    def __len__(self) -> int:
        return len(self._first_word_E)

    def key(self, row: int) -> bytes:
        return self._words_E4[row].astype(">u8").tobytes()

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """The row of each key, -1 if there is none."""
        wanted = _words(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES))
        candidate = np.searchsorted(self._first_word_E, wanted[:, 0])
        found = np.full(len(keys), -1, dtype=np.int64)
        open_rows = np.arange(len(keys))
        while open_rows.size:  # once, unless two keys share their first 8 bytes
            open_rows = open_rows[candidate[open_rows] < len(self)]
            same_first = self._first_word_E[candidate[open_rows]] == wanted[open_rows, 0]
            open_rows = open_rows[same_first]
            equal = (self._words_E4[candidate[open_rows]] == wanted[open_rows]).all(axis=1)
            found[open_rows[equal]] = candidate[open_rows[equal]]
            open_rows = open_rows[~equal]
            candidate[open_rows] += 1
        return found


def _words(keys_E32: np.ndarray) -> np.ndarray:
    """[E, 4] unsigned words that sort like the keys' bytes."""
    return np.ascontiguousarray(keys_E32).view(">u8").reshape(-1, 4).astype(np.uint64)
