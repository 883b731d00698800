"""In-place updates of some rows of attention results.

Legend: T packed tokens, C updated rows, H heads, D head size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bpo_kernels import dispatch

# Rounding of one result in its dtype, relative to the largest true value.
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def results(dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Attention [count, H, D] over some keys, laid out as projections leave it, and log-sum-exps [H, count]."""
    count, heads, size = shape
    out = torch.randn(1, heads, count, size, device=device).to(dtype)[0].transpose(0, 1)
    return out, 30 * torch.randn(heads, count, device=device)


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize(("heads", "size"), [(3, 8), (17, 40)])
def test_merged_attention_is_that_over_all_keys(
    dtype: torch.dtype, heads: int, size: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    out, lse = results(dtype, device, (9, heads, size))
    part, part_lse = results(dtype, device, (4, heads, size))
    rows = torch.tensor([7, 2, 8, 3], dtype=torch.int32, device=device)
    before, lse_before = out.double(), lse.double()
    dispatch.merge_rows(out, lse, rows, part, part_lse)
    expected, expected_lse = before.clone(), lse_before.clone()
    for c, row in enumerate(rows.tolist()):
        for h in range(heads):
            both = torch.stack([lse_before[h, row], part_lse[h, c].double()])
            share = both.softmax(0)
            expected[row, h] = share[0] * before[row, h] + share[1] * part[c, h].double()
            expected_lse[h, row] = both.logsumexp(0)
    torch.testing.assert_close(out.double(), expected, atol=STEP[dtype] * float(before.abs().max()), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
    others = [0, 1, 4, 5, 6]
    assert torch.equal(out[others].double(), before[others])


@pytest.mark.parametrize("dtype", STEP)
def test_sums_of_rows_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    total, part = results(dtype, device, (6, 17, 40))[0], results(dtype, device, (3, 17, 40))[0]
    rows = torch.tensor([5, 0, 2], dtype=torch.int32, device=device)
    expected = total.float()
    expected[rows.long()] += part.float()
    dispatch.add_rows(total, rows, part)
    torch.testing.assert_close(total.float(), expected, atol=1e-6, rtol=2 * STEP[dtype])


def test_no_rows_change_nothing(device: torch.device) -> None:
    out, lse = results(torch.float32, device, (3, 2, 8))
    none = torch.empty(0, dtype=torch.int32, device=device)
    before = out.clone(), lse.clone()
    dispatch.merge_rows(out, lse, none, out[:0], lse[:, :0])
    dispatch.add_rows(out, none, out[:0])
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
