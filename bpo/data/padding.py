"""Padding of images to a square before the image processor (`data.image_aspect: pad`), as LLaVA-1.5 was trained.

The converted LLaVA-1.5 checkpoints have a processor that scales the shorter side to 336 pixels and crops the centre, so
the left and right eighths of a 4:3 photo are never seen, although annotations describe them.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

Colour = tuple[int, int, int]


def pad_to_square(picture: Image.Image, colour: Colour) -> Image.Image:
    """The RGB picture in the middle of a square of its longer side, as LLaVA's `expand2square`.

    An odd margin is larger by one pixel at the right or the bottom.
    """
    side = max(picture.size)
    if picture.width == picture.height:
        return picture
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def mean_colour(image_processor: Any) -> Colour:
    """The processor's mean as a colour, int(255 mean) per channel as in LLaVA: 0 or nearly so after normalisation.

    Raises:
        ValueError: The processor has no mean of three channels.
    """
    mean = getattr(image_processor, "image_mean", None)
    if not isinstance(mean, list | tuple) or len(mean) != 3:
        raise ValueError(
            f"data.image_aspect is pad, but the image processor has no mean of three channels (image_mean: {mean!r}) "
            "to pad with; remove data.image_aspect"
        )
    red, green, blue = (int(255 * channel) for channel in mean)
    return red, green, blue


def visible_share(image_processor: Any, width: int, height: int, padded: bool) -> float:
    """Fraction of the area of a picture of `width` x `height` pixels that is left by the processor's centre crop."""
    size, crop = dict(image_processor.size or {}), dict(getattr(image_processor, "crop_size", None) or {})
    if not getattr(image_processor, "do_center_crop", False) or not crop.get("width"):
        return 1.0
    side_x, side_y = (max(width, height),) * 2 if padded else (width, height)
    shortest = size.get("shortest_edge")
    scale_x, scale_y = (
        (shortest / min(side_x, side_y),) * 2 if shortest else (size["width"] / side_x, size["height"] / side_y)
    )
    seen_x = min(1.0, crop["width"] / (width * scale_x))
    seen_y = min(1.0, crop["height"] / (height * scale_y))
    return seen_x * seen_y
