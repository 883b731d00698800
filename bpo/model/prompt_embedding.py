"""Embeddings of prompts with their images: of the text, by the model or a sentence encoder, and of the images.

Shape letters: G prompts, T tokens, R rows of vision features, D size of an embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bpo.config.training import Config, missing_model
from bpo.data.families import Family
from bpo.data.families.llava import Llava
from bpo.model.reference.fingerprint import weight_files

OWN = "model"  # value of `loss.prompt_embedding` for the model's input embeddings

# RoBERTa's positions start at 2: of max_position_embeddings, two are not for tokens.
_UNUSED_POSITIONS = 2
_BATCH = 64  # texts per forward pass of a sentence encoder


def check_prompt_embedding(config: Config) -> None:
    """Checks `loss.prompt_embedding` without loading weights. Takes about a second for a sentence encoder.

    Raises:
        ValueError: it is neither `model` nor the directory of a sentence encoder with its tokenizer and weights.
    """
    if config.loss.prompt_embedding != OWN:
        _tokenizer_of(config.loss.prompt_embedding)


class SentenceEncoder:
    """A transformers encoder in fp32 whose outputs are averaged over a text's tokens.

    Args:
        path: Directory of the model with its tokenizer, as sentence-transformers saves it.

    Raises:
        ValueError: see `check_prompt_embedding`; or the weights are damaged.
    """

    def __init__(self, path: str, device: torch.device):
        from transformers import AutoModel

        self._tokenizer, self._max_tokens = _tokenizer_of(path)
        # Weights that the files lack (a pooler) are drawn at random: training's own draws must not depend on it.
        with _named_errors(path), torch.random.fork_rng(devices=[]):
            model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        self._model = model.to(device).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Means [G, D] of the last hidden states over the tokens of each text, in fp32 on the encoder's device.

        A longer text than the encoder takes is cut at its end. One without any token is zero.
        """
        means = []
        for start in range(0, len(texts), _BATCH):
            some = list(texts[start : start + _BATCH])
            options = {"padding": True, "truncation": True, "max_length": self._max_tokens}
            inputs = self._tokenizer(some, return_tensors="pt", **options).to(self._model.device)
            hidden_GTD = self._model(**inputs).last_hidden_state
            mask_GT1 = inputs["attention_mask"][:, :, None].to(hidden_GTD)
            means.append((hidden_GTD * mask_GT1).sum(1) / mask_GT1.sum(1).clamp(min=1))
        return torch.cat(means)


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turns the libraries' errors about files of the encoder into one line that names the option."""
    try:
        yield
    except Exception as error:  # for a missing or damaged file: OSError, KeyError, ValueError, SafetensorError
        raise ValueError(_refused(path, " ".join(str(error).split()))) from error


def _refused(path: str, fault: str) -> str:
    return f"loss.prompt_embedding is {path!r}: {fault}; set it to `model`, or to the directory of a sentence encoder"


def _tokenizer_of(path: str) -> tuple[Any, int]:
    """The tokenizer of an encoder's directory, and how many tokens the encoder takes."""
    from transformers import AutoConfig, AutoTokenizer

    directory = Path(path)
    fault = missing_model(path) or ("" if directory.is_dir() else "no such directory")
    files = [] if fault else weight_files(directory)
    if not fault and not files:
        fault = "the directory has no weights (model.safetensors, or its index with all shards)"
    if missing := [file.name for file in files if not file.is_file()]:
        fault = f"weight files are missing: {', '.join(missing)}"
    if fault:
        raise ValueError(_refused(path, fault))
    with _named_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(_refused(path, f"`{config.model_type}` has a decoder, which needs inputs of its own"))
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a directory without its files
        raise ValueError(_refused(path, "the directory has no tokenizer (tokenizer.json, or its vocabulary)"))
    if tokenizer.pad_token is None:
        raise ValueError(_refused(path, "its tokenizer has no padding token"))
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    return tokenizer, int(min(tokenizer.model_max_length, max(1, positions - _UNUSED_POSITIONS)))


def token_means(model: Any, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Means [G, D] of the model's input embeddings over the tokens of each prompt, in fp32; zero without tokens.

    The embedding is called as a module, so that ZeRO-3 gathers its matrix.
    """
    flat_T = torch.tensor([index for ids in token_ids for index in ids], dtype=torch.long, device=model.device)
    embedded_TD = model.get_input_embeddings()(flat_T).float()
    lengths = [len(ids) for ids in token_ids]
    return torch.stack([part_TD.sum(0) / max(1, len(part_TD)) for part_TD in embedded_TD.split(lengths)])


def num_entries(image_inputs: dict[str, torch.Tensor]) -> int:
    """Images and tiles in `pixel_values`, or patches where these are separate (Qwen-VL); 0 without images."""
    pixels = image_inputs.get("pixel_values")
    if pixels is None:
        return 0
    return len(pixels) if pixels.dim() == 2 else math.prod(pixels.shape[:-3])


def vision_features(model: Any, family: Family, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The vision tower's features [entries, ..., D] before the projector, of the layer that the model reads.

    The tower is called as a module, so that ZeRO-3 gathers its weights. `get_image_features` would return the
    projector's output, and for some families reads parameters that no such call gathers.

    Args:
        image_inputs: Of at least one image, on the model's device, pixels in its dtype.
    """
    tower = model.get_submodule(family.vision_module)
    pixels = image_inputs["pixel_values"]
    if "image_grid_thw" in image_inputs:
        return tower(pixels, grid_thw=image_inputs["image_grid_thw"]).last_hidden_state
    pixels = pixels.flatten(0, -4)  # Idefics3 puts the tiles of a batch in one more dimension
    layers = getattr(model.config, "vision_feature_layer", None)
    if layers is None or (layers == -1 and not isinstance(family, Llava)):
        features = tower(pixel_values=pixels).last_hidden_state
    else:  # not the same as the tower's output, which a layer norm may follow
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = torch.cat([hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    strategy = getattr(model.config, "vision_feature_select_strategy", None)
    return features[:, 1:] if strategy == "default" else features


def image_means(
    model: Any, family: Family, image_inputs: dict[str, torch.Tensor], entries: Sequence[int]
) -> torch.Tensor:
    """Means [G, D] of `vision_features` over all tokens of each prompt's images, in fp32; zero for one without images.

    Args:
        image_inputs: Of all prompts in order, at least one image, which need not be of a prompt.
        entries: `num_entries` of each prompt.
    """
    features = vision_features(model, family, image_inputs).float()
    rows_RD = features.flatten(0, -2)
    per_entry = len(rows_RD) // len(features)
    used_RD = rows_RD[: sum(entries) * per_entry]
    return torch.stack(
        [part_RD.sum(0) / max(1, len(part_RD)) for part_RD in used_RD.split([n * per_entry for n in entries])]
    )


def joined(text_GD: torch.Tensor, image_GD: torch.Tensor) -> torch.Tensor:
    """Unit vectors [G, D + D] of the text's and the image's direction: e = [t/|t|, v/|v|], divided by its length.

    The cosine of two prompts with images is the mean of the cosines of their texts and of their images. A part that is
    zero stays zero.
    """
    return F.normalize(torch.cat([F.normalize(text_GD, dim=1), F.normalize(image_GD, dim=1)], dim=1), dim=1)
