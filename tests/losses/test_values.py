"""Rewards of the divergences, by the derivatives that define them. Shape letter: P pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.losses.pairs import pair_values

CHOSEN, REJECTED, BETA = [0.7, -1.2, 3.0], [-0.4, 0.9, -2.0], 0.5


def margins(divergence: str, alpha: float = 0.5, **fields: object) -> list[float]:
    values = pair_values(CHOSEN, REJECTED, beta=BETA, divergence=divergence, divergence_alpha=alpha, **fields)
    return values.margin_P.tolist()


@pytest.mark.parametrize(
    ("divergence", "f"),
    [
        ("reverse_kl", lambda u: u * torch.log(u)),
        ("forward_kl", lambda u: -torch.log(u)),
        ("js", lambda u: u * torch.log(u) - (1 + u) * torch.log((1 + u) / 2)),
        # f-DPO's alpha divergence with alpha = 0.5, written out from its table.
        ("alpha", lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5)),
    ],
)
def test_the_reward_is_the_derivative_of_the_divergences_function(
    divergence: str, f: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    u = torch.tensor([CHOSEN, REJECTED], dtype=torch.float64).exp().requires_grad_()
    (slope,) = torch.autograd.grad(f(u).sum(), u)
    assert margins(divergence) == pytest.approx((slope[0] - slope[1]).tolist(), rel=1e-12)


def test_forward_kl_and_js_by_hand() -> None:
    assert margins("forward_kl")[0] == pytest.approx(math.exp(0.4) - math.exp(-0.7))
    softplus = math.log1p(math.exp(0.7)) - math.log1p(math.exp(-0.4))
    assert margins("js")[0] == pytest.approx(1.1 - softplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_goes_over_into_both_kl_divergences(dtype: torch.dtype) -> None:
    assert margins("alpha", alpha=1e-6, dtype=dtype) == pytest.approx(margins("reverse_kl"), rel=1e-5)
    assert margins("alpha", alpha=1.0, dtype=dtype) == margins("forward_kl", dtype=dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("alpha", [1e-6, 0.5, 3.0])
def test_far_from_the_reference_the_margin_stays_finite(divergence: str, alpha: float) -> None:
    far = 1e4 / min(alpha, 1)
    chosen, rejected = [far, -far, far, -far], [-far, far, far, -far]
    values = pair_values(
        chosen, rejected, dtype=torch.float32, beta=10.0, divergence=divergence, divergence_alpha=alpha
    )
    assert torch.isfinite(values.delta_P).all()
    assert values.delta_P[0] > 0 > values.delta_P[1] and values.delta_P[2:].tolist() == [0, 0]
    values.delta_P.sum().backward()
    assert torch.isfinite(values.chosen_logp_P.grad).all() and torch.isfinite(values.rejected_logp_P.grad).all()


def test_js_keeps_small_differences_of_large_ratios() -> None:
    values = pair_values([20.0], [21.0], dtype=torch.float32, divergence="js")
    expected = math.log1p(math.exp(-21)) - math.log1p(math.exp(-20))
    assert values.margin_P.item() == pytest.approx(expected, rel=1e-5)
