"""Counts the useful work of a micro-batch during collation, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bpo.data.encode import EncodedGroup
from bpo.records import UsefulWork


def useful_work(groups: Sequence[EncodedGroup], config: Any) -> UsefulWork:
    """Returns the work of the groups, counting each prefix and its images once, independent of the batch layout.

    Args:
        groups: What one micro-batch packs (`bpo.data.cells.packed_members`: one per view), without stand-ins.
        config: Transformers config of the model.
    """
    tokens = responses = image_tokens = pairs = 0
    images = Rows(0, 0, 0)
    for group in groups:
        prefix_ids = group.prompt.prefix_ids
        lengths = [len(ids) for ids in group.completion_ids]
        tokens += len(prefix_ids) + sum(lengths)
        responses += sum(lengths)
        image_tokens += prefix_ids.count(config.image_token_id)
        pairs += attended_pairs(len(prefix_ids), lengths)
        images = Rows(*(a + b for a, b in zip(images, image_rows(group.prompt.image_inputs, config), strict=True)))
    return UsefulWork(
        tokens=tokens,
        responses=responses,
        image_tokens=image_tokens,
        pairs=pairs,
        patches=images.patches,
        patch_pairs=images.pairs,
        patch_window_pairs=images.window_pairs,
    )


def attended_pairs(prefix: int, completions: Sequence[int]) -> int:
    """Returns the number of attended (query, key) pairs of a group; completions attend to the prefix and themselves."""
    own = sum(length * prefix + length * (length + 1) // 2 for length in completions)
    return prefix * (prefix + 1) // 2 + own


class Rows(NamedTuple):
    """Vision tower work: rows, attention pairs over whole images, and attention pairs over windows."""

    patches: int
    pairs: int
    window_pairs: int


def image_rows(image_inputs: dict[str, torch.Tensor], config: Any) -> Rows:
    """Returns the vision tower work of images.

    Args:
        image_inputs: Keyword arguments of the vision tower: `image_grid_thw` [I, 3], or `pixel_values` [..., 3, H, W]
            whose leading dimensions are images and their tiles.
        config: Transformers config of the model.
    """
    vision = config.vision_config
    grid_thw = image_inputs.get("image_grid_thw")
    if grid_thw is not None:
        patches = whole = windows = 0
        for frames, rows, columns in grid_thw.tolist():
            patches += frames * rows * columns
            whole += frames * (rows * columns) ** 2
            windows += frames * window_pairs(rows, columns, vision)
        return Rows(patches, whole, windows)
    pixels = image_inputs.get("pixel_values")
    if pixels is None:
        return Rows(0, 0, 0)
    size = vision.patch_size
    patch_height, patch_width = (size, size) if isinstance(size, int) else size
    length = (pixels.shape[-2] // patch_height) * (pixels.shape[-1] // patch_width)
    length += int(has_class_token(config))
    num_images = math.prod(pixels.shape[:-3])
    return Rows(num_images * length, num_images * length**2, 0)


def has_class_token(config: Any) -> bool:
    """Returns whether the tower prepends a class token to the patches, as in CLIP and InternVL."""
    return config.vision_config.model_type in ("clip_vision_model", "internvl_vision")


def window_pairs(rows: int, columns: int, vision: Any) -> int:
    """Returns the attention pairs within the windows of an image of `rows` x `columns` patches (Qwen2.5-VL), or 0."""
    window = getattr(vision, "window_size", None)
    if window is None:
        return 0
    side = window // vision.patch_size

    def squares(length: int) -> int:
        return (length // side) * side**2 + (length % side) ** 2

    return squares(rows) * squares(columns)
