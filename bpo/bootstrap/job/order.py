"""Order of work: batches of records of similar lengths, ordered so that the records of any prefix are a fair sample.

Records in random order are cut into windows of `WINDOW_BATCHES` batches and sorted by length within each window, so the
records of a batch have similar lengths, which keeps padding low. The batches of a window follow each other in the order
of a van der Corput sequence (bit-reversed counting), whose every prefix covers all lengths evenly. A job that is
stopped has thus finished whole windows, which are random samples, and an even selection by length of one more window.

Longest records first would reveal a lack of memory at the start, but bias what a stopped job has finished. Instead, the
first batch has the longest record: padded to its length, the batch is as large as any.
"""

from __future__ import annotations

import numpy as np

from bpo.job.seeds import derive_seed

WINDOW_BATCHES = 64  # a power of two


def shuffled(digests: bytes | bytearray, digest_bytes: int, seed: int) -> np.ndarray:
    """Positions [N] of records in a random order that depends on the seed and their ids, not on their order in a file.

    Args:
        digests: A digest of `digest_bytes` bytes, at least 8, per record.
    """
    words_N2 = np.frombuffer(digests, dtype=np.uint64).reshape(-1, digest_bytes // 8)
    # The finalizer of SplitMix64, a bijection of 64-bit words.
    mixed_N = words_N2[:, 0] ^ np.uint64(derive_seed(seed, "order of work"))
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed_N ^ (mixed_N >> np.uint64(31)), kind="stable")


def fair_batches(
    lengths_N: np.ndarray, kinds_N: np.ndarray, size: int, seed: int, window: int = WINDOW_BATCHES
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts shuffled records into batches in a fair order; a batch has records of one kind.

    Args:
        lengths_N: Length of each record, in the shuffled order.
        kinds_N: Kind of each record; the kinds take turns in proportion to their numbers of batches.
        size: Records per batch; the last batch of a kind may have fewer.
        window: Batches per window; 1 keeps the records in random order, for engines that do not pad.

    Returns:
        Indices [N] of the records in processing order, and the offset [B + 1] of each batch among them.
    """
    if not len(lengths_N):
        return np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    longest = int(np.argmax(lengths_N))
    batches: list[np.ndarray] = []
    turns: list[np.ndarray] = []
    for kind in np.unique(kinds_N):
        of_kind_M = np.flatnonzero(kinds_N == kind)
        if kind == kinds_N[longest]:
            of_kind_M = np.concatenate(([longest], of_kind_M[of_kind_M != longest]))
            first, of_kind_M = of_kind_M[:size], of_kind_M[size:]
        in_windows_M = of_kind_M[np.lexsort((lengths_N[of_kind_M], np.arange(len(of_kind_M)) // (size * window)))]
        count = -(-len(of_kind_M) // size)
        order = _batch_order(count, window, derive_seed(seed, "batches", int(kind)))
        batches += [in_windows_M[size * number : size * (number + 1)] for number in order]
        turns.append((np.arange(count) + 0.5) / max(1, count))
    ordered = [first, *(batches[index] for index in np.argsort(np.concatenate(turns), kind="stable"))]
    starts = np.cumsum([0, *map(len, ordered)])
    return np.concatenate(ordered), starts


def _batch_order(count: int, window: int, seed: int) -> np.ndarray:
    """Numbers of `count` batches: window after window, each in bit-reversed order from a random start."""
    bits = (window - 1).bit_length()
    reversed_W = np.zeros(1 << bits, dtype=np.int64)
    for bit in range(bits):
        reversed_W |= ((np.arange(1 << bits) >> bit) & 1) << (bits - 1 - bit)
    # XOR with a constant keeps the sequence even, and so does leaving out what lies beyond the end.
    shifts = np.random.default_rng(seed).integers(0, 1 << bits, -(-count // window))
    order = (np.arange(len(shifts))[:, None] * window + (reversed_W[None] ^ shifts[:, None])).ravel()
    return order[order < count]
