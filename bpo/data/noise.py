"""Forward diffusion on normalised pixels: the noise that weakens an image (arXiv 2403.08730, section 3.1).

Shape letters: S diffusion steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bpo.data.encode import EncodedImages
    from bpo.data.families import Family

NUM_STEPS = 1000
BETA_MIN, BETA_MAX = 1e-5, 0.5e-2


@lru_cache(maxsize=1)
def alpha_bar_S() -> torch.Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), fp64 [S], with beta rising from 1e-5 to 0.5e-2 as a sigmoid over [-6, 6]."""
    ramp_S = torch.linspace(-6, 6, NUM_STEPS, dtype=torch.float64)
    beta_S = torch.sigmoid(ramp_S) * (BETA_MAX - BETA_MIN) + BETA_MIN
    return torch.cumprod(1 - beta_S, dim=0)


def diffuse(pixels: torch.Tensor, step: int, epsilon: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, in one step.

    Args:
        pixels: x_0, normalised pixels of any shape.
        step: t in 0..999.
        epsilon: Standard normal noise of the same shape.

    Raises:
        ValueError: `step` is not in the schedule, or the shapes differ.
    """
    if not 0 <= step < NUM_STEPS:
        raise ValueError(f"noise step {step} is not in the schedule; choose one of 0..{NUM_STEPS - 1}")
    if pixels.shape != epsilon.shape:
        raise ValueError(f"pixels {tuple(pixels.shape)} and noise {tuple(epsilon.shape)} differ in shape")
    alpha_bar = float(alpha_bar_S()[step])
    return alpha_bar**0.5 * pixels + (1 - alpha_bar) ** 0.5 * epsilon


def diffuse_images(images: EncodedImages, family: Family, step: int, generator: torch.Generator) -> EncodedImages:
    """The images of one prompt with their normalised pixels at `step`, in fp32; all other inputs as they are.

    Raises:
        ValueError: `step` is not in the schedule.
    """
    pixels = images.inputs["pixel_values"].float()
    noised = diffuse(pixels, step, family.noise_like(pixels, generator))
    return replace(images, inputs={**images.inputs, "pixel_values": noised})
