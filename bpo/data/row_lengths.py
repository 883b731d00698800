"""Row lengths of a run whose layers are compiled: packed rows are padded to a few lengths, each compiled once.

Shape letters: M different sizes of rows, ascending; X position channels (1 or 3).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bpo.data.families import Family
from bpo.records import GroupBatch, PackedLayout

# Every length is a multiple of it: products of matrices with fewer rows take as long.
MULTIPLE = 64
# Padding attends only within pieces of this many rows, as attention is quadratic in a piece.
PIECE = 64


def choose_lengths(num_tokens: Iterable[int], number: int) -> tuple[int, ...]:
    """The at most `number` lengths, ascending, that pad rows of `num_tokens` tokens with the fewest tokens in total.

    Depends only on how often each count occurs, so it is the same on all ranks and in a resumed run.

    Args:
        num_tokens: Tokens of each row, of which the longest determines the last length.
        number: Maximum number of lengths.
    """
    counts = np.fromiter(num_tokens, dtype=np.int64)
    sizes_M, rows_M = np.unique(-(-counts // MULTIPLE) * MULTIPLE, return_counts=True)
    if len(sizes_M) <= number:
        return tuple(sizes_M.tolist())
    before_M1 = np.concatenate([[0], rows_M.cumsum()])
    # [i, j]: tokens of all rows of sizes i to j, padded to size j; impossible for i > j.
    tokens_MM = (before_M1[None, 1:] - before_M1[:-1, None]) * sizes_M[None]
    tokens_MM = np.where(np.tri(len(sizes_M), k=-1, dtype=bool), np.iinfo(np.int64).max // 2, tokens_MM)
    # The last of k lengths is size j and covers sizes i to j; k - 1 lengths cover those below i.
    least_M, starts = tokens_MM[0], []
    for _ in range(number - 1):
        tokens_of_last_MM = tokens_MM + np.concatenate([[0], least_M[:-1]])[:, None]
        starts.append(tokens_of_last_MM.argmin(axis=0))
        least_M = tokens_of_last_MM.min(axis=0)
    lengths, last = [], len(sizes_M) - 1
    for start_M in [*reversed(starts), np.zeros(len(sizes_M), dtype=np.int64)]:
        if last >= 0:
            lengths.append(int(sizes_M[last]))
            last = int(start_M[last]) - 1
    return tuple(reversed(lengths))


def spaced_lengths(max_tokens: int, number: int) -> tuple[int, ...]:
    """`number` lengths at equal distances up to `max_tokens`, for rows that are not known before they are made."""
    return tuple(sorted({-(-max_tokens * k // (number * MULTIPLE)) * MULTIPLE for k in range(1, number + 1)}))


def padded_length(num_tokens: int, lengths: Sequence[int]) -> int:
    """The first of the ascending `lengths` that fits; for longer rows, the next multiple of the last."""
    return next((length for length in lengths if length >= num_tokens), -(-num_tokens // lengths[-1]) * lengths[-1])


def pad_row(batch: GroupBatch, lengths: Sequence[int], family: Family) -> GroupBatch:
    """The batch with its packed row padded to the first of `lengths` that fits.

    Padding belongs to no group, like a stand-in image: prefixes without completions, which nothing attends to, and of
    which no row of the loss depends, so values and gradients stay the same.
    """
    count = batch.input_ids_T.numel()
    extra = padded_length(count, lengths) - count
    if not extra:
        return batch
    ends = [*range(count, count + extra, PIECE), count + extra]
    pieces = tuple(itertools.pairwise(ends))
    layout, ids_T = batch.layout, batch.input_ids_T
    padding_id = int(family.image_token_id == 0)  # any token but the image's, which the model would count
    positions_XT = (torch.arange(extra) % PIECE).expand(batch.position_ids_XT.shape[0], -1)
    return dataclasses.replace(
        batch,
        layout=PackedLayout((*layout.prefix_spans, *pieces), (*layout.completion_spans, *[()] * len(pieces))),
        input_ids_T=torch.cat([ids_T, ids_T.new_full((extra,), padding_id)]),
        position_ids_XT=torch.cat([batch.position_ids_XT, positions_XT], dim=1),
    )
