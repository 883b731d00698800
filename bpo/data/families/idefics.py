"""Idefics3 and SmolVLM: tiles tagged with row and column, followed by the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bpo.data.families.base import ImagePlace, PlainPositions

if TYPE_CHECKING:
    from PIL import Image


class Idefics3(PlainPositions):
    """Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299).

    The row and column tags are special tokens in SmolVLM's tokenizer and plain text in Idefics3's, so they are inserted
    into the prompt as text.
    """

    vision_module = "model.vision_model"
    projector_modules = ("model.connector",)
    language_module = "model.text_model"
    image_keys = ("pixel_values", "pixel_attention_mask")
    processor_options = {"return_row_col_info": True}
    smallest_options = {"do_image_splitting": False}
    # Features after the connector are grouped by prompt, following `pixel_values`.
    repeats_features = False

    @property
    def tokens_per_tile(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2

    def nested(self, pictures: Sequence[Image.Image]) -> list[Any]:
        return [list(pictures)]

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        return [sum(place.runs) for place in self._places(outputs, "", "", "")]

    def places(self, outputs: dict[str, Any], tokenizer: Any) -> list[ImagePlace]:
        border = getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>"
        whole = getattr(tokenizer, "global_image_token", None) or "<global-img>"
        return self._places(outputs, border, whole, tokenizer.convert_ids_to_tokens(self.image_token_id))

    def _places(self, outputs: dict[str, Any], border: str, whole: str, image: str) -> list[ImagePlace]:
        places = []
        for rows, columns in zip(outputs["rows"][0], outputs["cols"][0], strict=True):
            lines = [
                "".join(f"{border}<row_{row}_col_{column}>{image}" for column in range(1, int(columns) + 1)) + "\n"
                for row in range(1, int(rows) + 1)
            ]
            text = "".join(lines) + ("\n" if lines else "") + f"{border}{whole}{image}{border}"
            places.append(ImagePlace(text, (self.tokens_per_tile,) * (int(rows) * int(columns) + 1)))
        return places

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns tiles [1, tiles, channels, height, width] of equal size, without padded tiles or pixels."""
        inputs = super().image_inputs(outputs)
        if not inputs["pixel_attention_mask"].all():
            raise ValueError(
                "the image processor padded a tile; set max_image_size.longest_edge to the vision tower's "
                f"image_size, {self.config.vision_config.image_size}"
            )
        return inputs

    def entries(self, image_inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        tiles = range(image_inputs["pixel_values"].shape[1])
        return [{key: value[:, i : i + 1] for key, value in image_inputs.items()} for i in tiles]

    def batch_image_inputs(self, image_inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Concatenates all tiles as if they were in one prompt, which keeps their order and avoids padding."""
        keys = self.image_keys if image_inputs else ()
        return {key: torch.cat([inputs[key] for inputs in image_inputs], dim=1) for key in keys}
