"""A small run on the tiny LLaVA."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpo.config.training import Config, DataConfig, ModelConfig, TrainConfig
from bpo.data import encode
from bpo.data.encode import Encoder
from tests.sample_groups import PHOTOS, encoder_of
from tests.training.doubles import NUM_GROUPS


@pytest.fixture(scope="module")
def encoder(tiny_llava_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, photo_root)


@pytest.fixture
def run(tiny_llava_dir: Path, photo_root: Path, tmp_path: Path) -> Config:
    """Twelve groups, four of each picture, in steps of six groups and micro-batches of about two."""
    with (tmp_path / "groups.jsonl").open("w") as file:
        for i in range(NUM_GROUPS):
            completions = [{"response": f"{k} {i}", "score": int(k == "yes"), "type": "gt"} for k in ("yes", "no")]
            images = [list(PHOTOS)[i % len(PHOTOS)]]
            file.write(json.dumps({"id": f"g{i}", "images": images, "prompt": "?", "completions": completions}) + "\n")
    return Config(
        model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
        data=DataConfig(groups=str(tmp_path / "groups.jsonl"), image_root=str(photo_root), num_workers=0),
        train=TrainConfig(
            output_dir=str(tmp_path / "run"), groups_per_step=6, epochs=1, max_micro_batch_tokens=90, max_steps=1
        ),
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often this process has decoded each picture."""
    counts: Counter[str] = Counter()
    load: Callable[..., Any] = encode.load_image

    def counted(root: Path, image: str) -> Any:
        counts[image] += 1
        return load(root, image)

    monkeypatch.setattr(encode, "load_image", counted)
    return counts
