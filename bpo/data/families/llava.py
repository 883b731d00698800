"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: a grid of patches; the latter two also tile images of any resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bpo.data.families.base import PlainPositions
from bpo.data.padding import Colour, mean_colour

if TYPE_CHECKING:
    from PIL import Image

# Towers that emit a class token before the patches.
_CLASS_TOKEN_TOWERS = {"clip_vision_model"}


class Llava(PlainPositions):
    """LLaVA-1.5 (arXiv 2310.03744): a fixed number of tokens per image."""

    vision_module = "model.vision_tower"
    projector_modules = ("model.multi_modal_projector",)
    language_module = "model.language_model"

    def __init__(self, config: Any, share_prefix: str = "auto"):
        super().__init__(config, share_prefix)
        if config.vision_config.model_type == "pixtral":
            raise ValueError(
                "LLaVA with a Pixtral tower is not supported because its images have variable row lengths; "
                "use a tower with a fixed image size, such as CLIP or SigLIP"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Number of vision features per tile, after the class token is dropped or kept."""
        vision = self.config.vision_config
        with_class_token = vision.model_type in _CLASS_TOKEN_TOWERS
        # "default" always drops the first feature, class token or not.
        drops_first = self.config.vision_feature_select_strategy == "default"
        return (vision.image_size // vision.patch_size) ** 2 + int(with_class_token) - int(drops_first)

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        return [self.tokens_per_tile] * len(outputs["pixel_values"])

    def padding_colour(self, image_processor: Any) -> Colour:
        return mean_colour(image_processor)


class LlavaNext(Llava):
    """LLaVA-NeXT: the whole image, then the tiles of the best-fitting canvas in rows, without its padding.

    Each row of the canvas ends with the learned `image_newline`. Tokens follow `LlavaNextModel.pack_image_features`.
    """

    image_keys: tuple[str, ...] = ("pixel_values", "image_sizes")
    projector_parameters = ("model.image_newline",)

    def padding_colour(self, image_processor: Any) -> Colour:
        return PlainPositions.padding_colour(self, image_processor)  # its tiles show the whole image

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        return [self.tokens_per_tile + self._canvas_tokens(*size) for size in outputs["image_sizes"].tolist()]

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Concatenates the tiles of all images, without the tiles that the processor adds as padding."""
        inputs = super().image_inputs(outputs)
        counts = self._num_tiles(outputs)
        tiles = [tiles[:count] for tiles, count in zip(inputs["pixel_values"], counts, strict=True)]
        return {**inputs, "pixel_values": torch.cat(tiles)}

    def _num_tiles(self, outputs: dict[str, Any]) -> list[int]:
        return [1 + math.prod(self._canvas_tiles(*size)) for size in outputs["image_sizes"].tolist()]

    def _canvas_tiles(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns of tiles of the best canvas for an image of this size in pixels."""
        from transformers.image_processing_utils import select_best_resolution

        canvas = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        tile = self.config.vision_config.image_size
        return canvas[0] // tile, canvas[1] // tile

    def _canvas_tokens(self, height: int, width: int) -> int:
        rows, columns = self._canvas_patches(height, width)
        return rows * (columns + 1)

    def _canvas_patches(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns of patches of the canvas without its padding."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        tile_rows, tile_columns = self._canvas_tiles(height, width)
        rows, columns = tile_rows * side, tile_columns * side
        # Rounded to 7 digits as in transformers; otherwise a quotient just below an integer loses a row.
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return rows, columns


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision (arXiv 2408.03326): canvases above `anyres_max_N` tiles are downscaled; prompts with several
    images are not tiled."""

    image_keys = ("pixel_values", "image_sizes", "batch_num_images")

    def nested(self, pictures: Sequence[Image.Image]) -> list[Any]:
        return [list(pictures)]

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        if len(outputs["image_sizes"]) > 1:
            return [self.tokens_per_tile + 1] * len(outputs["image_sizes"])  # one tile and one newline
        return super().num_image_tokens(outputs)

    def _num_tiles(self, outputs: dict[str, Any]) -> list[int]:
        num_images = len(outputs["image_sizes"])
        return [1] * num_images if num_images > 1 else super()._num_tiles(outputs)

    def _canvas_patches(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super()._canvas_patches(height, width)
        vision = self.config.vision_config
        max_tiles = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (max_tiles * (vision.image_size // vision.patch_size) ** 2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
