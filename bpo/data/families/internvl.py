"""InternVL in transformers format (`-hf` checkpoints): tiles of equal size in a single run of image tokens."""

from __future__ import annotations

from typing import Any

from bpo.data.families.base import ImagePlace, PlainPositions


class InternVL(PlainPositions):
    """InternVL 2.5, 3 and 3.5 (arXiv 2404.16821): a canvas of tiles and a thumbnail, pixel-shuffled."""

    vision_module = "model.vision_tower"
    projector_modules = ("model.multi_modal_projector",)
    language_module = "model.language_model"
    # InternVL's processor always enables tiling, regardless of the image processor's config.
    processor_options = {"crop_to_patches": True}
    smallest_options = {"crop_to_patches": False}

    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        vision = self.config.vision_config
        height, width = vision.image_size
        patch_height, patch_width = vision.patch_size
        patches = (height // patch_height) * (width // patch_width)
        tokens_per_tile = int(patches * self.config.downsample_ratio**2)
        return [tokens_per_tile * int(tiles) for tiles in outputs["num_patches"]]

    def places(self, outputs: dict[str, Any], tokenizer: Any) -> list[ImagePlace]:
        start = getattr(tokenizer, "start_image_token", None) or "<img>"
        end = getattr(tokenizer, "end_image_token", None) or "</img>"
        image = tokenizer.convert_ids_to_tokens(self.image_token_id)
        return [ImagePlace(f"{start}{image}{end}", (count,)) for count in self.num_image_tokens(outputs)]
