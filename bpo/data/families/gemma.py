"""Gemma 3: a fixed number of tokens per image, with bidirectional attention among them."""

from __future__ import annotations

from typing import Any

import torch

from bpo.data.families.base import ImagePlace, PlainPositions


class Gemma3(PlainPositions):
    """Gemma 3 (arXiv 2503.19786). With pan and scan, an image and each of its crops have separate tokens."""

    vision_module = "model.vision_tower"
    projector_modules = ("model.multi_modal_projector",)
    language_module = "model.language_model"
    smallest_options = {"do_pan_and_scan": False}
    looks_ahead_in_images = True

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        return [self.config.mm_tokens_per_image * (1 + int(crops)) for crops in outputs["num_crops"]]

    def placeholder(self, tokenizer: Any) -> str:
        return str(tokenizer.convert_ids_to_tokens(self.config.boi_token_id))

    def places(self, outputs: dict[str, Any], tokenizer: Any) -> list[ImagePlace]:
        begin, image, end = tokenizer.convert_ids_to_tokens(
            [self.config.boi_token_id, self.image_token_id, self.config.eoi_token_id]
        )
        crop = f"\n\n{begin}{image}{end}\n\n"
        places = []
        for crops in map(int, outputs["num_crops"]):
            text = crop
            if crops:  # same wording as in the model's processor
                introduction = "and here are some crops to help you see better"
                text = f"Here is the original image {crop} {introduction} {' '.join([crop] * crops)}"
            places.append(ImagePlace(text, (self.config.mm_tokens_per_image,) * (1 + crops)))
        return places

    def sequence_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Marks image tokens with 1; the model's masks allow bidirectional attention within each run of them."""
        return {"token_type_ids": (input_ids_BT == self.image_token_id).long()}
