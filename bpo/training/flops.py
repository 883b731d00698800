"""Useful floating-point operations of a micro-batch: those that the method requires, for any implementation.

Counts the matrix products (2 FLOPs per multiply-accumulate) of the forward pass and of the gradients that training
requires, as `torch.utils.flop_counter.FlopCounterMode` does. Excludes work that makes no progress: recomputation,
fillers, stand-in images, masked pairs of tokens, layers whose output is discarded. A view of a group counts as one more
prefix, with its own image and the completions scored under it; forward and backward, as in the packed row, although a
view that only guides (`guidance_view`) or supplies tokens (`pairs: argmax`) would need no gradient.
MFU = these FLOPs / (seconds x peak of the devices), after PaLM (arXiv 2204.02311, appendix B), which counts attention
without its causal mask; here a causal query is counted with the keys that it attends to, about half of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bpo.data.families import Family
from bpo.records import UsefulWork

# Modules that read a decoder layer's input, which in the first layer may not need a gradient.
_READS_LAYER_INPUT = re.compile(r"\.layers\.0\..*\.(q_proj|k_proj|v_proj|qkv_proj)\b")


@dataclass(frozen=True)
class Products:
    """Multiply-accumulates per row: of the forward pass, of the inputs' gradients, of the weights' gradients."""

    forward: int = 0
    input_grad: int = 0
    weight_grad: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.forward + other.forward,
            self.input_grad + other.input_grad,
            self.weight_grad + other.weight_grad,
        )

    @property
    def backward(self) -> int:
        return self.input_grad + self.weight_grad


@dataclass(frozen=True)
class ModelFlops:
    """Matrix products of a model by part, given what is trained; see `model_flops`.

    attention_width: heads x head size, summed over the language model's layers.
    vision_width, vision_window_width: the same for the tower's layers over whole images and over windows.
    """

    language: Products
    head: Products
    projector: Products
    vision: Products
    attention_width: int
    vision_width: int
    vision_window_width: int
    vision_trained: bool

    def forward(self, work: UsefulWork) -> int:
        """FLOPs of one forward pass over `work`, which is all that the reference pass needs."""
        return sum(2 * macs for macs in self.forward_macs(work).values())

    def backward(self, work: UsefulWork) -> int:
        """FLOPs of the gradients: of trained weights, and of the activations between them and the loss."""
        attention = 2 * self._attention(work)
        vision_attention = 2 * self._vision_attention(work) if self.vision_trained else 0
        macs = self.language.backward * work.tokens + self.head.backward * work.responses + attention
        macs += self.projector.backward * work.image_tokens + self.vision.backward * work.patches + vision_attention
        return 2 * macs

    def step(self, work: UsefulWork) -> int:
        """Forward and backward."""
        return self.forward(work) + self.backward(work)

    def forward_macs(self, work: UsefulWork) -> dict[str, int]:
        """Multiply-accumulates of the forward pass by part."""
        return {
            "language": self.language.forward * work.tokens,
            "attention": self._attention(work),
            "head": self.head.forward * work.responses,
            "projector": self.projector.forward * work.image_tokens,
            "vision": self.vision.forward * work.patches + self._vision_attention(work),
        }

    def _attention(self, work: UsefulWork) -> int:
        return 2 * self.attention_width * work.pairs  # query x key, and probability x value

    def _vision_attention(self, work: UsefulWork) -> int:
        return 2 * (self.vision_width * work.patch_pairs + self.vision_window_width * work.patch_window_pairs)


def model_flops(model: Any, family: Family) -> ModelFlops:
    """Counts a prepared model (see `prepare_trainable`): each weight matrix and the gradients that it needs.

    Works on meta tensors and under ZeRO-3, where weights have no elements: only shapes and `requires_grad` are read.
    """
    config = model.config
    flags = _Trained(model, family)
    parts: dict[str, Products] = {name: Products() for name in ("language", "head", "projector", "vision")}
    first_of_projector = True
    for name, shape, trained in weight_matrices(model):
        part = part_of(name, family)
        if part == "other" or (part == "vision" and _is_discarded(name, config)):
            continue
        macs = math.prod(shape)
        if len(shape) == 3:  # [experts, in, out]; each token is routed to a few
            macs = macs // shape[0] * config.get_text_config().num_experts_per_tok
        if part == "vision":
            input_grad = flags.vision and len(shape) == 2  # pixels need no gradient
        elif part == "projector":
            input_grad = flags.vision or flags.projector_norm or (flags.projector and not first_of_projector)
            first_of_projector = False
        elif part == "language":
            input_grad = flags.language and (flags.stream or not _READS_LAYER_INPUT.search(f".{name}"))
        else:
            input_grad = flags.language
        parts[part] += Products(macs, macs if input_grad else 0, macs if trained else 0)
    text, vision = config.get_text_config(), config.vision_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers, whole = _vision_layers(config)
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    return ModelFlops(
        **parts,
        attention_width=text.num_hidden_layers * text.num_attention_heads * head_size,
        vision_width=whole * hidden,
        vision_window_width=(layers - whole) * hidden,
        vision_trained=flags.vision,
    )


class _Trained:
    """Which parts have a gradient, in their weights or passing through.

    A frozen matrix after a trained norm needs its input's gradient even if nothing before the norm is trained.
    """

    def __init__(self, model: Any, family: Family):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        parts = {part_of(name, family) for name in names}
        norms = {part_of(name, family) for name in names if re.search(r"(norm|ln_)\w*\.weight$", name)}
        self.vision = "vision" in parts
        self.projector = self.vision or "projector" in parts
        self.projector_norm = "projector" in norms
        self.stream = self.projector or model.get_input_embeddings().weight.requires_grad or "language" in norms
        self.language = self.stream or "language" in parts


def part_of(name: str, family: Family) -> str:
    """The part of the model that a parameter or module belongs to: language, head, projector, vision or other."""

    def inside(module: str) -> bool:
        return name == module or name.startswith(f"{module}.")

    if any(inside(module) for module in (*family.projector_modules, *family.projector_parameters)):
        return "projector"
    if inside(family.vision_module):
        return "vision"
    if inside(family.language_module):
        return "language"
    return "head" if inside("lm_head") else "other"


def weight_matrices(model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yields name, shape and `requires_grad` of every weight of a matrix product, a patch convolution or experts.

    Embeddings are looked up, not multiplied; a head that is tied to them is yielded under its own name.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            shape = tuple(getattr(parameter, "unpacked_shape", getattr(parameter, "ds_shape", parameter.shape)))
            if len(shape) in (2, 4, 5) or (len(shape) == 3 and ".experts." in name):
                yield name, shape, parameter.requires_grad


def _vision_layers(config: Any) -> tuple[int, int]:
    """Number of tower layers whose output is used, and of those that attend over whole images."""
    vision = config.vision_config
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is not None:
        # hidden_states[0] is the embeddings' output and hidden_states[k] that of k layers.
        depth = max(depth + 1 + k if k < 0 else k for k in ([chosen] if isinstance(chosen, int) else chosen))
    whole = getattr(vision, "fullatt_block_indexes", None)
    return depth, depth if whole is None else sum(i < depth for i in whole)


def _is_discarded(name: str, config: Any) -> bool:
    """Whether a weight of the tower belongs to a layer after the last one whose features are used."""
    layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    return layer is not None and int(layer.group(1)) >= _vision_layers(config)[0]
