"""Diffusion noise for image weakening."""

from __future__ import annotations

import pytest
import torch

from bpo.data.noise import alpha_bar_S, diffuse


@pytest.mark.parametrize(
    ("step", "signal", "noise"),
    [(500, 0.863017, 0.505175), (900, 0.364888, 0.931051), (999, 0.285042, 0.958515)],
)
def test_weights_of_image_and_noise(step: int, signal: float, noise: float) -> None:
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert diffuse(one, step, zero).item() == pytest.approx(signal, abs=1e-6)
    assert diffuse(zero, step, one).item() == pytest.approx(noise, abs=1e-6)


def test_a_constant_image_becomes_noise_of_the_schedules_mean_and_variance() -> None:
    pixels = torch.full((200_000,), 2.0)
    noised = diffuse(pixels, 700, torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)))
    alpha_bar = alpha_bar_S()[700].item()
    assert noised.mean().item() == pytest.approx(2 * alpha_bar**0.5, abs=0.01)
    assert noised.var().item() == pytest.approx(1 - alpha_bar, abs=0.01)


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_schedule_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match=rf"{step}.*0\.\.999"):
        diffuse(torch.zeros(2), step, torch.zeros(2))


def test_noise_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        diffuse(torch.zeros(2), 5, torch.zeros(3))
