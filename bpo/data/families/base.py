"""Interface of model families: image tokens in the prompt, position ids, image inputs of the model.

Shape letters: B sequences, T tokens, X position channels (1, or 3 for multimodal rotary positions), I images.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bpo.data.families.sharing import why_separate
from bpo.data.padding import Colour

if TYPE_CHECKING:
    from PIL import Image

    from bpo.data.processor import Processor


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Representation of one image in a prompt.

    Attributes:
        text: Replaces the chat template's placeholder; contains a single image token for each run of them.
        runs: Length of each run, in tokens.
    """

    text: str
    runs: tuple[int, ...]


class Family(abc.ABC):
    """Model-specific behaviour that transformers does not expose through a common interface.

    Attributes:
        vision_module: Dotted name of the vision tower in the model.
        projector_modules: Dotted names of the modules that map vision features to the language model.
        projector_parameters: Dotted names of projector parameters that are outside these modules.
        language_module: Dotted name of the language model.
        image_keys: Outputs of the image processor that the model takes; the first is `pixel_values`.
        processor_options: Options of every image processor call, as in the family's own processor.
        smallest_options: Additional options that minimise the tokens per image, for stand-ins.
        looks_ahead_in_images: Whether image tokens attend to later tokens of their image.
        repeats_features: Whether the projector's output has one row [tokens, D] per entry of `pixel_values` before it
            is scattered to the image tokens, so that features computed once can be repeated.
        begins_from_cache: Whether prompts with images may follow cached keys and values of the text before the image.
        separate_reason: Why completions cannot share the keys and values of their prefix; None if they can.
        tower_modules: Dotted names of the modules that need not run if the projector is given its inputs: the vision
            tower, or its parts if the projector is inside it.
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

    @property
    def tower_modules(self) -> tuple[str, ...]:
        return (self.vision_module,)

    @abc.abstractmethod
    def num_image_tokens(self, outputs: dict[str, Any]) -> list[int]:
        """Returns the number of image tokens of each image [I], from the image processor's outputs."""

    @abc.abstractmethod
    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the position ids [X, T] of a prompt; completions continue at their maximum + 1 in every channel."""

    def placeholder(self, tokenizer: Any) -> str:
        """Returns the chat template's placeholder of an image."""
        return str(tokenizer.convert_ids_to_tokens(self.image_token_id))

    def places(self, outputs: dict[str, Any], tokenizer: Any) -> list[ImagePlace]:
        """Returns the representation of each image [I] in the prompt."""
        text = str(tokenizer.convert_ids_to_tokens(self.image_token_id))
        return [ImagePlace(text, (count,)) for count in self.num_image_tokens(outputs)]

    def control_token_ids(self) -> set[int]:
        """Returns the ids of image, video and boundary tokens, which must not occur in text."""
        names = ("image", "video", "vision_start", "vision_end", "boi", "eoi")
        ids = (getattr(self.config, f"{name}_token_id", None) for name in names)
        return {index for index in ids if index is not None}

    def preprocess(
        self, processor: Processor, pictures: Sequence[Image.Image], *, smallest: bool = False
    ) -> tuple[dict[str, torch.Tensor], list[ImagePlace]]:
        """Returns the model inputs of the images of one prompt, and their representation in the prompt.

        Raises:
            ValueError: The image processor rejects an image.
        """
        options = self.processor_options | (self.smallest_options if smallest else {})
        outputs = dict(processor.image_processor(images=self.nested(pictures), return_tensors="pt", **options))
        places = self.places(outputs, processor.tokenizer)
        return self.image_inputs(outputs), places

    def pixel_limits(self, image_processor: Any) -> tuple[int, int] | None:
        """Returns the smallest and largest number of pixels to which images are resized; None if there are none."""
        return None

    def limit_pixels(self, image_processor: Any, min_pixels: int, max_pixels: int) -> None:
        """Sets the limits of `pixel_limits`; 0 keeps the processor's own.

        Raises:
            ValueError: The family has no such limits, or they exclude every size.
        """
        raise ValueError(
            "data.min_pixels and data.max_pixels are for models that resize images by their number of pixels "
            f"(Qwen-VL); `{self.config.model_type}` does not: remove them"
        )

    def padding_colour(self, image_processor: Any) -> Colour:
        """Returns the colour with which `data.image_aspect: pad` pads images to a square.

        Raises:
            ValueError: The family is not trained on padded images.
        """
        raise ValueError(
            "data.image_aspect: pad is for LLaVA-1.5, whose image processor crops images to a square; "
            f"`{self.config.model_type}` handles other aspect ratios itself: remove it"
        )

    def nested(self, pictures: Sequence[Image.Image]) -> list[Any]:
        """Returns the images of one prompt in the nesting expected by the image processor."""
        return list(pictures)

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the outputs of the image processor that the model takes."""
        return {key: torch.as_tensor(outputs[key]) for key in self.image_keys}

    def batch_image_inputs(self, image_inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Concatenates the images of several prompts in order, for one call of the vision tower."""
        keys = image_inputs[0] if image_inputs else {}
        return {key: torch.cat([inputs[key] for inputs in image_inputs]) for key in keys}

    def entries(self, image_inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Returns the vision tower's inputs of each image or tile that it encodes on its own, in order.

        `batch_image_inputs` joins them for one call of `run_tower`. The projector's inputs have as many rows per entry
        as its `pixel_values`.
        """
        others = {key: value[:0] for key, value in image_inputs.items() if key != "pixel_values"}
        return [{"pixel_values": tile, **others} for tile in image_inputs["pixel_values"].split(1)]

    def entry_keys(self, image_inputs: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """Returns a digest of the content of each entry."""
        return tuple(map(_digest, self.entries(image_inputs))) if image_inputs else ()

    def run_tower(self, model: Any, image_inputs: dict[str, torch.Tensor]) -> None:
        """Runs the vision tower and then the projector modules, which may end it by an exception."""
        model.model.get_image_features(**image_inputs)

    def sequence_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns additional inputs of a forward pass over ordinary sequences with images."""
        return {}

    def generation_inputs(self, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns inputs of `generate` in addition to ids, mask and images."""
        return self.sequence_inputs(input_ids_BT)

    def noise_like(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Returns standard normal noise (fp32) for the normalised pixels of one record."""
        return torch.randn(pixel_values.shape, generator=generator, dtype=torch.float32)


def _digest(entry: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in entry.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


class PlainPositions(Family):
    """Family with ordinary positions: 0, 1, 2, ... in one channel."""

    def prefix_positions(self, prefix_ids_T: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.arange(prefix_ids_T.numel())[None]
