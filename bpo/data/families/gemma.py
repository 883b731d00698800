"""Gemma 3: a fixed number of tokens an image, which attend to each other in both directions."""

from __future__ import annotations

from typing import Any

import torch

from bpo.data.families.base import ImagePlace, PlainPositions


class Gemma3(PlainPositions):
    """Gemma 3 (arXiv 2503.19786); with pan and scan an image and its crops each have their tokens."""

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
        one = f"\n\n{begin}{image}{end}\n\n"
        places = []
        for crops in map(int, outputs["num_crops"]):
            text = one
            if crops:  # the words are the processor's
                introduction = "and here are some crops to help you see better"
                text = f"Here is the original image {one} {introduction} {' '.join([one] * crops)}"
            places.append(ImagePlace(text, (self.config.mm_tokens_per_image,) * (1 + crops)))
        return places

    def sequence_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """1 for image tokens: the model's masks let each run of them see itself in both directions."""
        return {"token_type_ids": (input_ids_BT == self.image_token_id).long()}
