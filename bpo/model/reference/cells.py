"""Reference log-probs of the cells of a batch: from the store, and into it.

An entry holds the fp32 log-probs of a cell's tokens. That of a cell with second targets (`SecondTargets`) holds their
log-probs, then the tokens themselves. Shape letters: N response tokens, M second targets, K cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from bpo.model.reference.store import ReferenceStore
from bpo.records import GroupBatch


def with_reference(batch: GroupBatch, store: ReferenceStore, *, shared_tokens: bool = False) -> GroupBatch:
    """The batch with its reference; 0 for cells without a key, which the reference does not score.

    Args:
        shared_tokens: Whether second targets are the tokens that the reference found most likely.

    Raises:
        KeyError, ReferenceStoreError: see `ReferenceStore.gather`.
    """
    inputs = batch.loss_inputs
    keys = batch.reference_keys or ("",) * inputs.num_completions
    wanted = [(number, key, size, width) for number, key, size, width in _entries(batch, keys) if key]
    found = store.gather([key for _, key, _, _ in wanted]) if wanted else torch.zeros(0)
    parts: dict[int, torch.Tensor] = {}
    tokens: list[torch.Tensor] = []
    pieces = found.split([width for _, _, _, width in wanted])
    for (number, _, size, width), values in zip(wanted, pieces, strict=True):
        parts[number] = values[:size]
        if width > size:
            tokens.append(values[size:])
    sizes = inputs.completion_starts_K1.diff().tolist()
    logp_N = torch.cat([parts.get(number, torch.zeros(size)) for number, size in enumerate(sizes)])
    second = inputs.second
    if second is not None and shared_tokens:
        token_M = torch.cat(tokens).long() if tokens else torch.zeros_like(second.base_M)
        second = replace(second, token_M=token_M)
    return replace(batch, loss_inputs=replace(inputs, reference=logp_N, second=second))


def put_reference(
    store: ReferenceStore, batch: GroupBatch, logp_N: torch.Tensor, second_M: torch.Tensor | None
) -> None:
    """Stores the cells of a batch that have a key and no entry yet.

    Args:
        logp_N: Log-probs of all cells, on the CPU.
        second_M: Second targets, on the CPU.
    """
    starts = batch.loss_inputs.completion_starts_K1.tolist()
    num_packed = batch.target_N.numel()
    for number, key, size, width in _entries(batch, batch.reference_keys):
        if not key or key in store:
            continue
        first = starts[number]
        values = logp_N[first : first + size]
        if width > size:
            assert second_M is not None
            values = torch.cat([values, second_M[first - num_packed : first - num_packed + size].float()])
        store.put(key, values)


def _entries(batch: GroupBatch, keys: tuple[str, ...]) -> Iterator[tuple[int, str, int, int]]:
    """Of each cell: its number, key, number of tokens, and number of values of its entry."""
    starts = batch.loss_inputs.completion_starts_K1.tolist()
    num_packed = batch.target_N.numel()
    for number, key in enumerate(keys):
        size = starts[number + 1] - starts[number]
        yield number, key, size, 2 * size if starts[number] >= num_packed and size else size
