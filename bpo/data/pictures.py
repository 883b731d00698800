"""Changes of decoded pictures, before the image processor: noise, masked cells, a crop.

Shape letters: H, W height and width of a picture in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from bpo.data.noise import diffuse

MASK_CELLS = 14
# Largest change of a crop's aspect ratio, up or down.
CROP_RATIO = 4 / 3
_GREY = 127


def normalisation(image_processor: Any | None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation per channel, of pixel values 0..1; 0.5 if the processor has none."""
    mean = getattr(image_processor, "image_mean", None) or [0.5] * 3
    std = getattr(image_processor, "image_std", None) or [0.5] * 3
    return mean, std


def noise_picture(
    picture: Image.Image, step: int, mean: Sequence[float], std: Sequence[float], generator: torch.Generator
) -> Image.Image:
    """Forward diffusion in pixel space: x'_t = mean + std * x_t of the pixel values x' = mean + std * x.

    x are the normalised values. The result is clipped to 0..1 and rounded to 1/255. If nothing is clipped and the
    processor does not scale the picture, this equals noise in normalised space with the same epsilon, up to rounding. A
    processor that scales the picture down averages part of the noise away.

    Raises:
        ValueError: `step` is not in the schedule.
    """
    mean_311 = torch.tensor(mean, dtype=torch.float32).reshape(3, 1, 1)
    std_311 = torch.tensor(std, dtype=torch.float32).reshape(3, 1, 1)
    values_3HW = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    clean_3HW = (values_3HW - mean_311) / std_311
    epsilon_3HW = torch.randn(clean_3HW.shape, generator=generator, dtype=torch.float32)
    noised_3HW = mean_311 + std_311 * diffuse(clean_3HW, step, epsilon_3HW)
    bytes_HW3 = (noised_3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(bytes_HW3.numpy())


def masked_cells(share: float) -> int:
    """Number of the 14 x 14 cells that a mask of `share` covers."""
    return round(share * MASK_CELLS**2)


def mask_picture(picture: Image.Image, share: float, generator: torch.Generator) -> Image.Image:
    """The picture with `share` of its 14 x 14 cells painted grey."""
    order = torch.randperm(MASK_CELLS**2, generator=generator)
    covered = picture.copy()
    for cell in order[: masked_cells(share)].tolist():
        row, column = divmod(cell, MASK_CELLS)
        left, right = (picture.width * at // MASK_CELLS for at in (column, column + 1))
        top, bottom = (picture.height * at // MASK_CELLS for at in (row, row + 1))
        covered.paste((_GREY, _GREY, _GREY), (left, top, right, bottom))
    return covered


def crop_picture(picture: Image.Image, min_area: float, max_area: float, generator: torch.Generator) -> Image.Image:
    """A random region scaled back to the picture's size, as the negative image of mDPO (arXiv 2406.11839, section 3.2).

    Its area is uniform in `min_area`..`max_area` of the picture's, its aspect ratio log-uniform in 3/4..4/3 of the
    picture's own as far as the region fits into the picture, its position uniform.
    """
    area, ratio_draw, left_draw, top_draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    area = min_area + (max_area - min_area) * area
    widest = min(math.log(CROP_RATIO), -math.log(area))  # an area of 0.9 allows ratios of 0.9..1/0.9
    ratio = math.exp(widest * (2 * ratio_draw - 1))
    shares = math.sqrt(area * ratio), math.sqrt(area / ratio)
    width, height = (min(side, max(1, round(side * share))) for side, share in zip(picture.size, shares, strict=True))
    left, top = int(left_draw * (picture.width - width + 1)), int(top_draw * (picture.height - height + 1))
    region = picture.crop((left, top, left + width, top + height))
    return region.resize(picture.size, Image.Resampling.BICUBIC)
