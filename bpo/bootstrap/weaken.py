"""Image weakening: with a noised, cropped, masked or missing image the answer falls back on the language prior.

The answer is generated from the weakened image *only*. Contrasting clean and noised logits, as visual contrastive
decoding does, would move it away from the prior, the opposite of the goal here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from bpo.config.bootstrap import WeakenConfig
from bpo.data.encode import EncodedImages
from bpo.data.families import Family
from bpo.data.noise import diffuse_images
from bpo.data.padding import Colour, pad_to_square
from bpo.data.pictures import mask_picture, noise_picture, normalisation
from bpo.job.seeds import derive_seed

NO_NOISE = -1

Kind = Literal["none", "noise", "crop", "mask", "no-image"]


@dataclass(frozen=True, slots=True)
class Weakening:
    """How a record's images are modified before the model answers.

    Attributes:
        kind: `none` keeps the clean images, `no-image` removes them.
        seed: Determines the noise, the crop position and the masked cells.
        noise_step: For `noise`.
        space: For `noise`: `normalised` or `pixel`.
    """

    kind: Kind
    seed: int
    noise_step: int | None = None
    space: str | None = None

    @property
    def changes_pictures(self) -> bool:
        """Whether it is applied to pictures, before the image processor."""
        return self.kind in ("crop", "mask") or (self.kind == "noise" and self.space == "pixel")


def choose_weakening(source: str, options: WeakenConfig, seed: int) -> Weakening:
    """The weakening that a source of `bootstrap.sources` applies to the record with seed `seed`; none for most."""
    if source == "text-only":
        return Weakening("no-image", seed)
    if source in ("crop", "mask"):
        return Weakening("crop" if source == "crop" else "mask", seed)
    if source != "weaken":
        return Weakening("none", seed)
    steps = options.noise_steps or [options.noise_step]
    step = steps[derive_seed(seed, "noise step") % len(steps)]
    return Weakening("none", seed) if step == NO_NOISE else Weakening("noise", seed, step, options.space)


def weaken_images(images: EncodedImages, family: Family, noise_step: int, seed: int) -> EncodedImages:
    """The images noised to `noise_step`; unchanged for step -1 or without images.

    The noise is drawn on the CPU from a generator seeded only by `seed`, so it is the same on every device.
    """
    if noise_step == NO_NOISE or not images.places:
        return images
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise"))
    return diffuse_images(images, family, noise_step, generator)


class PictureWeakener:
    """Weakens pictures before the image processor, so that they can also be sent to a server.

    Args:
        mean, std: Per channel, from the image processor (pixel values 0..1).
        padding: Colour with which pictures are padded to a square before noise is added, as the model sees them; crops
            and masks apply to the picture alone.
    """

    def __init__(
        self,
        weakening: Weakening,
        options: WeakenConfig,
        mean: Sequence[float],
        std: Sequence[float],
        padding: Colour | None = None,
    ):
        self.weakening, self.options, self.padding = weakening, options, padding
        self._mean, self._std = mean, std
        self._generator = torch.Generator().manual_seed(derive_seed(weakening.seed, "noise"))

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.weakening.kind == "crop":
            return self._crop(picture)
        if self.weakening.kind == "mask":
            return mask_picture(picture, self.options.mask_share, self._generator)
        if self.weakening.kind == "noise" and self.weakening.space == "pixel":
            return self._noise(picture)
        return picture

    def _noise(self, picture: Image.Image) -> Image.Image:
        assert self.weakening.noise_step is not None
        if self.padding is not None:
            picture = pad_to_square(picture, self.padding)
        scaled = _scaled(picture, self.options.pixel_side)
        return noise_picture(scaled, self.weakening.noise_step, self._mean, self._std, self._generator)

    def _crop(self, picture: Image.Image) -> Image.Image:
        """A region with `crop_share` of the picture's area and its aspect ratio."""
        side = self.options.crop_share**0.5
        width, height = (max(1, round(side * length)) for length in picture.size)
        left = self._draw(picture.width - width + 1)
        top = self._draw(picture.height - height + 1)
        return picture.crop((left, top, left + width, top + height))

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self._generator))


def picture_weakener(
    weakening: Weakening, options: WeakenConfig, image_processor: Any | None, padding: Colour | None = None
) -> PictureWeakener:
    """A weakener with the image processor's mean and standard deviation; 0.5 per channel without a processor."""
    mean, std = normalisation(image_processor)
    return PictureWeakener(weakening, options, mean, std, padding)


def _scaled(picture: Image.Image, longer_side: int) -> Image.Image:
    """Scales down to a longer side of `longer_side` pixels; never scales up."""
    longest = max(picture.size)
    if not longer_side or longest <= longer_side:
        return picture
    width, height = (max(1, round(length * longer_side / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
