"""Bytes and launches of operators: what is read and written, forward and backward; views and allocations are free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bpo.tools.bench import traffic
from bpo.tools.bench.traffic import Traffic, tensor_bytes

X = torch.ones(8, 4)  # 128 bytes
TABLE, IDS = torch.ones(1000, 4), torch.tensor([3, 5])


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    with Traffic() as found:
        run()
    return found.bytes, found.launches


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X + X.T.T, (3 * 128, 1)),
        (lambda: X @ torch.ones(4, 2).add_(1), (128 + 32 + 64 + 2 * 32 + 32, 3)),  # ones is filled, then added to
        (lambda: X.clone().mul_(2), (4 * 128, 2)),
        (lambda: torch.empty(8, 4).copy_(X), (2 * 128, 1)),
        (lambda: torch.add(X, X, out=torch.empty(8, 4)), (3 * 128, 1)),
        (lambda: X[:1].expand(8, 4) + X, (16 + 2 * 128, 1)),
        (lambda: X.view(-1, 2)[4:].T.detach(), (0, 0)),
        (lambda: torch.empty_like(X).shape, (0, 0)),
        (lambda: torch.nn.functional.embedding(IDS, TABLE), (2 * 32 + 16, 1)),
        (lambda: TABLE[IDS], (2 * 32 + 16, 1)),
        (lambda: TABLE.clone().index_put_((IDS,), torch.ones(2, 4)), (2 * 16000 + 32 + 3 * 32 + 16, 3)),
        (lambda: torch._foreach_add_([X.clone(), X.clone()], 1), (8 * 128, 3)),
    ],
)
def test_an_operator_moves_what_it_reads_and_writes(run: Callable[[], Any], expected: tuple[int, int]) -> None:
    assert counted(run) == expected


def test_operators_of_the_backward_pass_count() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    # Product and sum; the sum's gradient expanded, and the product's with the weight.
    forward = counted(lambda: (X @ weight).sum())
    both = counted(lambda: (X @ weight).sum().backward())
    assert forward == (128 + 64 + 128 + 128 + 4, 2)
    assert both[1] >= forward[1] + 2 and both[0] >= forward[0] + 128 + 64


def test_operators_of_the_kernels_count_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(traffic.OP_COSTS, "aten::mm", lambda a, b: (tensor_bytes(a), 5))
    assert counted(lambda: X @ torch.empty(4, 4)) == (128, 5)
