"""Images padded to a square: equal to LLaVA-1.5's own preprocessing to the bit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.data.padding import mean_colour, pad_to_square, visible_share

SIZES = [(64, 48), (48, 64), (37, 24), (24, 37), (31, 30), (1, 5), (33, 33)]
SIDE = 28


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8))


def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
    """As in llava/mm_utils.py of haotian-liu/LLaVA."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    elif width > height:
        result = Image.new(pil_img.mode, (width, width), background_color)
        result.paste(pil_img, (0, (width - height) // 2))
        return result
    else:
        result = Image.new(pil_img.mode, (height, height), background_color)
        result.paste(pil_img, ((height - width) // 2, 0))
        return result


def original_pixels(picture: Image.Image, mean: list[float], std: list[float]) -> np.ndarray:
    """LLaVA's process_images: expand2square, then CLIP's resize, centre crop (none is left), rescale and normalise."""
    square = expand2square(picture, tuple(int(x * 255) for x in mean))
    scaled = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    values = (scaled * (1 / 255)).astype(np.float32)
    return ((values - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)


def config_for(model: Path, root: Path, aspect: str = "pad") -> Config:
    data = DataConfig(image_root=str(root), image_aspect=aspect)  # type: ignore[arg-type]
    return Config(model=ModelConfig(path=str(model)), data=data)


@pytest.mark.parametrize("size", SIZES)
def test_padded_images_equal_the_originals_to_the_bit(
    tiny_llava_dir: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    picture = photo(*size)
    picture.save(tmp_path / "p.png")
    encoder = load_encoder(config_for(tiny_llava_dir, tmp_path))
    processor = encoder.processor.image_processor
    mean, std = list(processor.image_mean), list(processor.image_std)
    (pixels,) = encoder.encode_images(["p.png"]).inputs["pixel_values"]
    assert np.array_equal(pixels.numpy(), original_pixels(picture, mean, std))
    own = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=mean,
        image_std=std,
    )
    assert torch.equal(pixels, own(picture, return_tensors="pt")["pixel_values"][0])
    cropped = load_encoder(config_for(tiny_llava_dir, tmp_path, "processor")).encode_images(["p.png"])
    assert torch.equal(cropped.inputs["pixel_values"][0], pixels) == (size[0] == size[1])


def test_an_odd_margin_is_larger_behind_and_the_picture_is_kept() -> None:
    picture = photo(7, 4)
    square = np.asarray(pad_to_square(picture, (1, 2, 3)))
    assert square.shape == (7, 7, 3)
    assert np.array_equal(square[1:5], np.asarray(picture))
    assert (square[[0, 5, 6]] == [1, 2, 3]).all()


def test_the_colour_is_the_processors_mean_rounded_down(tiny_llava_dir: Path, tmp_path: Path) -> None:
    processor = load_encoder(config_for(tiny_llava_dir, tmp_path)).processor.image_processor
    assert mean_colour(processor) == (122, 116, 104)
    processor.image_mean = 0.5
    with pytest.raises(ValueError, match=r"image_aspect is pad.*no mean of three channels \(image_mean: 0.5\)"):
        mean_colour(processor)


@pytest.mark.parametrize(
    ("width", "height", "seen", "seen_padded"), [(640, 480, 0.75, 1.0), (480, 640, 0.75, 1.0), (336, 336, 1.0, 1.0)]
)
def test_the_share_of_a_photo_that_a_centre_crop_leaves(
    width: int, height: int, seen: float, seen_padded: float
) -> None:
    processor = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    assert visible_share(processor, width, height, padded=False) == pytest.approx(seen)
    assert visible_share(processor, width, height, padded=True) == pytest.approx(seen_padded)
    # Resized to 384 and cropped to 336: the crop also takes a margin of a padded photo, 24 of 384 pixels on each side.
    larger = LlavaImageProcessorPil(size={"shortest_edge": 384}, crop_size={"height": 336, "width": 336})
    assert visible_share(larger, 640, 480, padded=True) == pytest.approx(336 / 384)
    whole = LlavaImageProcessorPil(size={"height": 336, "width": 336}, do_center_crop=False)
    assert visible_share(whole, width, height, padded=False) == 1.0


@pytest.mark.parametrize(("aspect", "share"), [("processor", 75), ("pad", 100)])
def test_loading_says_how_much_of_a_photo_the_model_sees(
    tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, aspect: str, share: int
) -> None:
    with caplog.at_level(logging.INFO, "bpo"):
        load_encoder(config_for(tiny_llava_dir, tmp_path, aspect))
    assert f"data.image_aspect={aspect}: the model sees {share} % of a 4:3 photo" in caplog.messages


def test_stand_ins_and_square_images_are_the_same_with_and_without(tiny_llava_dir: Path, tmp_path: Path) -> None:
    config = config_for(tiny_llava_dir, tmp_path)
    plain = load_encoder(replace(config, data=replace(config.data, image_aspect="processor")))
    padded = load_encoder(config)
    assert torch.equal(padded.stand_in().image_inputs["pixel_values"], plain.stand_in().image_inputs["pixel_values"])
