"""Dropout masks from Philox4x32-10 (Salmon et al. 2011), a function of seed, stream and position alone.

Legend: T rows, D features, Q a quarter of the features, rounded up.

One evaluation gives four words: those of the counter (q, t, stream, 0) decide about the features q, q + Q, q + 2 Q and
q + 3 Q of row t. The key is the seed. `lora_kernels.py` computes the same words, whatever its tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def drop_threshold(dropout: float) -> int:
    """A feature is dropped if the upper 31 bits of its word are less than this."""
    return round(dropout * 2**31)


def philox_words(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words of each counter, as int64.

    Args:
        counter: four int64 tensors of values in [0, 2^32) that broadcast.
        seed: [1] int64, the key. It is not read on the host.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so both halves of the unsigned product are right.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _LOW) ^ c1 ^ k0, second & _LOW
        c2, c3 = ((first >> 32) & _LOW) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(num_rows: int, num_features: int, dropout: float, seed: Tensor, stream: int) -> Tensor:
    """[T, D] bool: which features are kept. Temporaries take about 60 bytes per four features."""
    device = seed.device
    quarter = -(-num_features // 4)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    q_1Q = torch.arange(quarter, device=device)[None, :]
    t_T1 = torch.arange(num_rows, device=device)[:, None]
    words = philox_words((q_1Q, t_T1, zero + stream, zero), seed)
    keep = [(word >> 1) >= drop_threshold(dropout) for word in words]
    return torch.cat(keep, dim=1)[:, :num_features]
