"""What differs between model families: image tokens, positions, and where the parts of the model are.

A family is chosen by `model_type`. To add one, write a subclass and name it in `FAMILIES`.
Shape letters: T tokens, X position channels (1, or 3 for multimodal rotary positions), I images.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch


class Family(abc.ABC):
    """Answers the questions that transformers leaves to each model family.

    Attributes:
        vision_module: Dotted name of the vision tower inside the model.
        projector_modules: Dotted names of what maps vision features to the language model.
        language_module: Dotted name of the language model.
    """

    vision_module: str
    projector_modules: tuple[str, ...]
    language_module: str

    def __init__(self, config: Any):
        self.config = config
        self.image_token_id: int = config.image_token_id

    @abc.abstractmethod
    def num_image_tokens(self, image_inputs: dict[str, torch.Tensor]) -> list[int]:
        """Placeholder tokens that each image takes in the prompt."""

    @abc.abstractmethod
    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Position ids [X, T] of a prompt; a completion goes on at their maximum + 1 in every channel."""

    def batch_image_inputs(self, image_inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The images of several prompts in order, as one call of the vision tower takes them."""
        return {key: torch.cat([one[key] for one in image_inputs]) for key in (image_inputs[0] if image_inputs else {})}

    def generation_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further inputs that `generate` needs beside ids, mask and images."""
        return {}

    def noise_like(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Standard normal noise for the normalised pixels of one record, fp32."""
        return torch.randn(pixel_values.shape, generator=generator, dtype=torch.float32)


class Llava(Family):
    """LLaVA-1.5: a fixed number of tokens an image, ordinary positions."""

    vision_module = "model.vision_tower"
    projector_modules = ("model.multi_modal_projector",)
    language_module = "model.language_model"

    def num_image_tokens(self, image_inputs: dict[str, torch.Tensor]) -> list[int]:
        pixels = image_inputs["pixel_values"]
        patch = self.config.vision_config.patch_size
        num_patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        # The CLIP tower emits one class token before the patches; "default" drops it again.
        with_class_token = self.config.vision_feature_select_strategy == "full"
        return [num_patches + int(with_class_token)] * pixels.shape[0]

    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.arange(prefix_ids_T.numel())[None]


class Qwen25VL(Family):
    """Qwen2.5-VL: as many tokens as the image has merged patches, three-channel rotary positions."""

    vision_module = "model.visual"
    projector_modules = ("model.visual.merger",)
    language_module = "model.language_model"

    def num_image_tokens(self, image_inputs: dict[str, torch.Tensor]) -> list[int]:
        merge = self.config.vision_config.spatial_merge_size
        return (image_inputs["image_grid_thw"].prod(-1) // merge**2).tolist()

    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Text runs count on in all channels; an image's tokens take (t, row, column) from where the text stopped.

        Equal to `Qwen2_5_VLModel.get_rope_index` (tested), without needing the model in the data workers.
        """
        merge = self.config.vision_config.spatial_merge_size
        grids = iter(image_inputs["image_grid_thw"].tolist() if image_inputs else [])
        is_image_T = (prefix_ids_T == self.image_token_id).tolist()
        runs: list[torch.Tensor] = []
        start = position = 0
        while start < len(is_image_T):
            if is_image_T[start]:
                frames, rows, columns = next(grids)
                rows, columns = rows // merge, columns // merge
                t, h, w = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
                runs.append(torch.stack([t.flatten(), h.flatten(), w.flatten()]) + position)
                start += frames * rows * columns
                position += max(rows, columns)
            else:
                end = next((i for i in range(start, len(is_image_T)) if is_image_T[i]), len(is_image_T))
                runs.append((torch.arange(end - start) + position).expand(3, -1))
                position += end - start
                start = end
        return torch.cat(runs, dim=1)

    def generation_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (input_ids_BT == self.image_token_id).int()}

    def noise_like(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # A row is (channel, frame, height, width) of one patch, and a still image fills all frames with the same
        # pixels: it must get the same noise in all of them, or averaging over frames would take half of it away.
        vision = self.config.vision_config
        frames, patch = vision.temporal_patch_size, vision.patch_size
        rows = pixel_values.shape[0]
        channels = pixel_values.shape[1] // (frames * patch * patch)
        still = torch.randn((rows, channels, 1, patch * patch), generator=generator, dtype=torch.float32)
        return still.expand(-1, -1, frames, -1).reshape(pixel_values.shape)


FAMILIES: dict[str, type[Family]] = {"llava": Llava, "qwen2_5_vl": Qwen25VL}


def family_of(config: Any) -> Family:
    """The family of a transformers model config.

    Raises:
        ValueError: for a model type that is not supported, listing those that are.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model type `{config.model_type}` is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type](config)
