"""Changes of decoded pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bpo.data.pictures import MASK_CELLS, crop_picture, mask_picture, noise_picture, normalisation

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def position_picture(width: int, height: int) -> Image.Image:
    """A picture whose red and green are the position in percent of its size."""
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([100 * columns / width, 100 * rows / height, 0 * rows], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


def test_noise_at_step_500_has_the_schedules_mean_and_deviation() -> None:
    picture = Image.new("RGB", (300, 300), (140, 120, 100))
    values = np.asarray(noise_picture(picture, 500, MEAN, STD, drawn())) / 255
    clean = (np.array([140, 120, 100]) / 255 - MEAN) / STD
    noised = (values - MEAN) / STD
    assert noised.mean(axis=(0, 1)) == pytest.approx(0.863017 * clean, abs=0.01)
    assert noised.std(axis=(0, 1)) == pytest.approx([0.505175] * 3, abs=0.01)


def test_noise_beyond_black_and_white_is_clipped() -> None:
    """Converted without clipping, values above 1 would start again at black."""
    for value, limit in ((255, 255), (0, 0)):
        noised = np.asarray(noise_picture(Image.new("RGB", (64, 64), (value,) * 3), 100, MEAN, STD, drawn()))
        assert 0.3 < (noised == limit).mean() < 0.7
        assert abs(noised.astype(int) - limit).max() < 64


def test_a_processor_without_a_mean_is_taken_to_centre_at_grey() -> None:
    class Unnormalised:
        image_mean = None

    assert normalisation(None) == normalisation(Unnormalised()) == ([0.5] * 3, [0.5] * 3)


def test_a_mask_covers_its_share_of_the_cells_of_a_copy() -> None:
    picture = Image.new("RGB", (150, 290), (255, 0, 0))
    covered = (np.asarray(mask_picture(picture, 0.3, drawn())) == 127).all(-1)
    assert covered.mean() == pytest.approx(round(0.3 * MASK_CELLS**2) / MASK_CELLS**2, abs=0.01)
    assert picture.getcolors() == [(150 * 290, (255, 0, 0))]
    assert (np.asarray(mask_picture(picture, 1.0, drawn())) == 127).all()


def test_a_crop_fills_the_size_with_a_part_of_a_drawn_area_and_shape() -> None:
    picture = position_picture(400, 200)
    areas, ratios, lefts = [], [], []
    generator = drawn()
    for _ in range(400):
        crop = crop_picture(picture, 0.01, 0.36, generator)
        assert crop.size == picture.size
        red, green, _ = np.asarray(crop).reshape(-1, 3).astype(float).T
        width, height = np.ptp(red) + 1, np.ptp(green) + 1  # in percent of the picture's
        areas.append(width * height / 1e4)
        ratios.append(width / height)
        lefts.append(red.min() / (100 - width))
    assert 0.005 < min(areas) < 0.02 and 0.34 < max(areas) < 0.38
    assert np.mean(areas) == pytest.approx(0.185, abs=0.02)  # sides drawn uniformly would give 0.143
    assert np.quantile(ratios, [0.02, 0.5, 0.98]) == pytest.approx([0.75, 1.0, 1.33], abs=0.06)
    assert np.quantile(lefts, [0.05, 0.5, 0.95]) == pytest.approx([0.05, 0.5, 0.95], abs=0.08)


def test_a_crop_of_almost_all_fits_into_the_picture() -> None:
    picture = position_picture(100, 100)
    for seed in range(20):
        red, green, _ = np.asarray(crop_picture(picture, 0.95, 0.95, drawn(seed))).reshape(-1, 3).astype(float).T
        assert (np.ptp(red) + 1) * (np.ptp(green) + 1) == pytest.approx(9500, rel=0.03)
    assert np.array_equal(np.asarray(crop_picture(picture, 1, 1, drawn())), np.asarray(picture))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 1000)])
def test_a_crop_of_a_tiny_picture_shows_at_least_a_pixel(size: tuple[int, int]) -> None:
    assert crop_picture(Image.new("RGB", size, (9, 9, 9)), 0.01, 0.01, drawn()).getpixel((0, 0)) == (9, 9, 9)
