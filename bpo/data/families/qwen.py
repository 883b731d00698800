"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at native resolution, three-channel rotary positions.

Shape letters: B sequences, T tokens, X position channels (3).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from bpo.data.families.base import Family


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): one token per merged patch."""

    vision_module = "model.visual"
    projector_modules: tuple[str, ...] = ("model.visual.merger",)
    language_module = "model.language_model"
    image_keys = ("pixel_values", "image_grid_thw")
    # The tower returns the merged features of all images, which are split by `image_grid_thw` afterwards.
    repeats_features = False
    # transformers 5.17 assigns positions from 0 to an image after cached tokens (5.23 does not).
    begins_from_cache = False

    @property
    def tower_modules(self) -> tuple[str, ...]:
        return (f"{self.vision_module}.patch_embed", f"{self.vision_module}.blocks")

    def entries(self, image_inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        grids = image_inputs["image_grid_thw"]
        images = image_inputs["pixel_values"].split(grids.prod(-1).tolist())
        return [
            {"pixel_values": rows, "image_grid_thw": grid} for rows, grid in zip(images, grids.split(1), strict=True)
        ]

    def run_tower(self, model: Any, image_inputs: dict[str, torch.Tensor]) -> None:
        # Not by calling the module: ZeRO-3's hooks would miss its end if the merger, inside it, ends it.
        model.model.visual.forward(image_inputs["pixel_values"], grid_thw=image_inputs["image_grid_thw"])

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        merge = self.config.vision_config.spatial_merge_size
        return (outputs["image_grid_thw"].prod(-1) // merge**2).tolist()

    def pixel_limits(self, image_processor: Any) -> tuple[int, int]:
        size = dict(image_processor.size)
        return size["shortest_edge"], size["longest_edge"]

    def limit_pixels(self, image_processor: Any, min_pixels: int, max_pixels: int) -> None:
        own_min, own_max = self.pixel_limits(image_processor)
        smallest, largest = min_pixels or own_min, max_pixels or own_max
        token_pixels = (image_processor.patch_size * image_processor.merge_size) ** 2
        if largest < max(smallest, token_pixels):
            raise ValueError(
                f"data.max_pixels={largest} is less than data.min_pixels={smallest} or the {token_pixels} pixels of "
                f"one image token (the model's own limits: {own_min} to {own_max})"
            )
        image_processor.size = type(image_processor.size)(shortest_edge=smallest, longest_edge=largest)

    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Text advances all channels; image tokens get (t, row, column) relative to the end of the preceding text.

        Equal to the model's `get_rope_index` (tested), but does not need the model in data workers.
        """
        merge = self.config.vision_config.spatial_merge_size
        grids = iter(image_inputs["image_grid_thw"].tolist() if image_inputs else [])
        is_image_T = (prefix_ids_T == self.image_token_id).numpy()
        changes = np.flatnonzero(is_image_T[1:] != is_image_T[:-1]) + 1
        runs: list[np.ndarray] = []
        position = 0
        for start, end in itertools.pairwise([0, *changes.tolist(), len(is_image_T)]):
            if not is_image_T[start]:
                runs.append(np.arange(position, position + end - start)[None].repeat(3, axis=0))
                position += end - start
                continue
            while start < end:  # images may follow each other without text between them
                frames, rows, columns = next(grids)
                rows, columns = rows // merge, columns // merge
                runs.append(np.indices((frames, rows, columns)).reshape(3, -1) + position)
                start += frames * rows * columns
                position += max(rows, columns)
        return torch.from_numpy(np.concatenate(runs, axis=1))

    def generation_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (input_ids_BT == self.image_token_id).int()}

    def noise_like(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # A row is (channel, frame, height, width) of one patch. A still image has the same pixels in all frames, so it
        # needs the same noise in all frames; averaging over frames would otherwise remove half of it.
        vision = self.config.vision_config
        frames, patch = vision.temporal_patch_size, vision.patch_size
        rows = pixel_values.shape[0]
        channels = pixel_values.shape[1] // (frames * patch * patch)
        still = torch.randn((rows, channels, 1, patch * patch), generator=generator, dtype=torch.float32)
        return still.expand(-1, -1, frames, -1).reshape(pixel_values.shape)


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of intermediate tower layers are added after the first layers of the language model.

    Timestamps apply only to videos. Image positions are the same as in Qwen2.5-VL; the model itself interleaves the
    channels of rotary frequencies.
    """

    projector_modules = ("model.visual.merger", "model.visual.deepstack_merger_list")
