"""In-place updates of some rows of attention results in plain PyTorch: the counterpart of attention_rows.py.

Legend: T packed tokens, C updated rows, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import statistics_dtype


def merge_rows(out_THD: Tensor, lse_HT: Tensor, rows_C: Tensor, part_CHD: Tensor, part_lse_HC: Tensor) -> None:
    """Merges, in place, attention over further keys into that of some rows.

    Attention over two disjoint sets of keys is the average of both results, weighted by the sums of exponentials:
    `out = w * part + (1 - w) * out` with `w = exp(part_lse - lse')` and `lse' = logaddexp(lse, part_lse)`.

    Args:
        out_THD: [T, H, D] attention over the first set; rows of `rows_C` are overwritten.
        lse_HT: [H, T] fp32 log-sum-exps of its scores; overwritten alike.
        rows_C: [C] int32 or int64, different rows.
        part_CHD: [C, H, D] attention of these rows over the second set.
        part_lse_HC: [H, C] fp32 log-sum-exps of its scores.
    """
    rows_C = rows_C.long()
    lse_HC = lse_HT[:, rows_C]
    merged_HC = torch.logaddexp(lse_HC, part_lse_HC)
    weight_CH1 = torch.exp(part_lse_HC - merged_HC).T[..., None]
    wide = statistics_dtype(out_THD.dtype)
    out_CHD = out_THD[rows_C].to(wide)
    out_THD[rows_C] = (out_CHD + weight_CH1 * (part_CHD.to(wide) - out_CHD)).to(out_THD.dtype)
    lse_HT[:, rows_C] = merged_HC


def add_rows(total_THD: Tensor, rows_C: Tensor, part_CHD: Tensor) -> None:
    """`total[rows] += part` in place, in fp32 and rounded once; `rows_C` are different rows."""
    rows_C = rows_C.long()
    wide = statistics_dtype(total_THD.dtype)
    total_THD[rows_C] = (total_THD[rows_C].to(wide) + part_CHD.to(wide)).to(total_THD.dtype)
