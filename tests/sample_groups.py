"""Small preference groups about three random pictures, and encoders for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, Encoder, load_encoder
from bpo.records import Completion, ContentPart, GroupBatch, PreferenceGroup, Turn

PHOTOS = {"wide.png": (90, 60), "tall.png": (58, 112), "square.png": (56, 56)}


def write_photos(folder: Path) -> Path:
    for seed, (name, (width, height)) in enumerate(PHOTOS.items()):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def turn(*parts: str | None, role: str = "user") -> Turn:
    """A turn; None is an image."""
    content = tuple(ContentPart("image") if part is None else ContentPart("text", part) for part in parts)
    return Turn(role, content)  # type: ignore[arg-type]


def group(
    name: str, *responses: str | tuple[str, float, str], image: str = "wide.png", prompt: Turn | None = None
) -> PreferenceGroup:
    """A group about one image; if responses are plain strings, the first is preferred to the others."""
    completions = []
    for k, one in enumerate(responses):
        text, score, kind = (one, float(k == 0), "mllm-hal" if k else "gt") if isinstance(one, str) else one
        completions.append(Completion(text, score, kind))
    return PreferenceGroup(name, (image,), (prompt or turn(None, "What?"),), tuple(completions))


def three_groups() -> list[PreferenceGroup]:
    """Groups of 3, 2 and 2 completions; the second has two images with text between and after them."""
    two_images = PreferenceGroup(
        "b",
        ("tall.png", "square.png"),
        (turn("First ", None, " and ", None, "?"), turn("a tree.", role="assistant"), turn("And now?")),
        (Completion("a car", 2.0, "gt"), Completion("two cars and a dog", 1.0, "llm-hal")),
    )
    return [
        group("a", "a cat", "a dog on a mat", "no", image="wide.png"),
        two_images,
        group("c", "yes", "maybe so", image="square.png", prompt=turn("Is it red? ", None)),
    ]


def encoder_of(model_dir: Path, image_root: Path, max_length_tokens: int = 2048, **options: Any) -> Encoder:
    """An encoder for a tiny model; `options` are those of `ModelConfig`."""
    model = ModelConfig(path=str(model_dir), dtype="float32", **options)
    data = DataConfig(image_root=str(image_root), max_length_tokens=max_length_tokens)
    return load_encoder(Config(model=model, data=data))


def encode_all(encoder: Encoder, groups: list[PreferenceGroup]) -> list[EncodedGroup]:
    encoded = [encoder.encode_group(group) for group in groups]
    assert all(isinstance(group, EncodedGroup) for group in encoded), encoded
    return encoded  # type: ignore[return-value]


def packed_batch(encoder: Encoder, groups: list[PreferenceGroup]) -> GroupBatch:
    return collate_groups(encode_all(encoder, groups), encoder.family)
