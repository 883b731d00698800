"""What every model family answers: image tokens in the prompt, positions, images as the model takes them.

Shape letters: B sequences, T tokens, X position channels (1, or 3 for multimodal rotary positions), I images.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bpo.data.families.sharing import why_separate

if TYPE_CHECKING:
    from PIL import Image

    from bpo.data.processor import Processor


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """What stands in a prompt for one image.

    Attributes:
        text: Takes the place of the chat template's placeholder; each run of image tokens in it is one image token.
        runs: The length of each of these runs, in tokens.
    """

    text: str
    runs: tuple[int, ...]


class Family(abc.ABC):
    """Answers the questions that transformers leaves to each model family.

    Attributes:
        vision_module: Dotted name of the vision tower inside the model.
        projector_modules: Dotted names of what maps vision features to the language model.
        projector_parameters: Dotted names of parameters of the projector that stand in no module of their own.
        language_module: Dotted name of the language model.
        image_keys: The image processor's outputs that the model takes; `pixel_values` is the first.
        processor_options: Passed to the image processor in every call, as the family's own processor does.
        smallest_options: Further ones that give an image as few tokens as the processor allows, for a stand-in.
        looks_ahead_in_images: Image tokens attend to later tokens of their image as well.
        repeats_features: The projector's output has one row [tokens, D] an entry of `pixel_values` and is next spread
            over the image tokens, so that features computed once can be repeated there.
        begins_from_cache: Prompts with images may follow cached keys and values of what stands before the first image.
        separate_reason: Why completions cannot share their prefix's keys and values; None where they can.
    """

    vision_module: str
    projector_modules: tuple[str, ...]
    projector_parameters: tuple[str, ...] = ()
    language_module: str
    image_keys: tuple[str, ...] = ("pixel_values",)
    processor_options: dict[str, Any] = {}
    smallest_options: dict[str, Any] = {}
    looks_ahead_in_images = False
    repeats_features = True
    begins_from_cache = True

    def __init__(self, config: Any, share_prefix: str = "auto"):
        self.config = config
        self.image_token_id: int = config.image_token_id
        self.separate_reason = why_separate(
            config.get_text_config(), share_prefix, looks_ahead_in_images=self.looks_ahead_in_images
        )

    @abc.abstractmethod
    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        """Image tokens of each image [I], from the image processor's outputs."""

    @abc.abstractmethod
    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Position ids [X, T] of a prompt; a completion goes on at their maximum + 1 in every channel."""

    def placeholder(self, tokenizer: Any) -> str:
        """What the chat template writes for an image."""
        return str(tokenizer.convert_ids_to_tokens(self.image_token_id))

    def places(self, outputs: dict[str, Any], tokenizer: Any) -> list[ImagePlace]:
        """What stands in the prompt for each image [I]."""
        text = str(tokenizer.convert_ids_to_tokens(self.image_token_id))
        return [ImagePlace(text, (count,)) for count in self.num_image_tokens(outputs)]

    def control_token_ids(self) -> set[int]:
        """Tokens that stand for images and videos or mark their borders: no text may hold them."""
        names = ("image", "video", "vision_start", "vision_end", "boi", "eoi")
        ids = (getattr(self.config, f"{name}_token_id", None) for name in names)
        return {index for index in ids if index is not None}

    def preprocess(
        self, processor: Processor, pictures: Sequence[Image.Image], *, smallest: bool = False
    ) -> tuple[dict[str, torch.Tensor], list[ImagePlace]]:
        """The images of one prompt as the model takes them, and what stands for each in the prompt.

        Raises:
            ValueError: the image processor refuses an image.
        """
        options = self.processor_options | (self.smallest_options if smallest else {})
        outputs = dict(processor.image_processor(images=self.nested(pictures), return_tensors="pt", **options))
        places = self.places(outputs, processor.tokenizer)
        return self.image_inputs(outputs), places

    def nested(self, pictures: Sequence[Image.Image]) -> list[Any]:
        """The pictures of one prompt in the structure that the image processor takes for one prompt."""
        return list(pictures)

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's part of the image processor's outputs."""
        return {key: torch.as_tensor(outputs[key]) for key in self.image_keys}

    def batch_image_inputs(self, image_inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The images of several prompts in order, as one call of the vision tower takes them."""
        return {key: torch.cat([one[key] for one in image_inputs]) for key in (image_inputs[0] if image_inputs else {})}

    def sequence_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further inputs of a forward pass over ordinary sequences, images among them."""
        return {}

    def generation_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further inputs that `generate` needs beside ids, mask and images."""
        return self.sequence_inputs(input_ids_BT)

    def noise_like(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Standard normal noise for the normalised pixels of one record, fp32."""
        return torch.randn(pixel_values.shape, generator=generator, dtype=torch.float32)


class PlainPositions(Family):
    """Ordinary positions: 0, 1, 2, ... in one channel."""

    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.arange(prefix_ids_T.numel())[None]
