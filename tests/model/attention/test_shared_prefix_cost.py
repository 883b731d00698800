"""Cost of packed attention by number of groups."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpo.model.attention.shared_prefix import shared_prefix_attention
from bpo.records import PackedLayout


class WrittenBytes(TorchDispatchMode):
    """Bytes of all results, saved or not."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def written_bytes(num_groups: int) -> int:
    starts = [24 * group for group in range(num_groups)]
    layout = PackedLayout(
        tuple((s, s + 12) for s in starts), tuple(((s + 12, s + 18), (s + 18, s + 24)) for s in starts)
    )
    inputs = [torch.randn(1, 2, 24 * num_groups, 8, requires_grad=True) for _ in range(3)]
    with WrittenBytes() as written:
        shared_prefix_attention(*inputs, layout).sum().backward()
    return written.total


def test_forward_and_backward_are_linear_in_the_groups_of_a_row() -> None:
    """A slice of the whole row for each group has a gradient as long as the row: the cost would be quadratic."""
    assert written_bytes(32) < 4.2 * written_bytes(8)
