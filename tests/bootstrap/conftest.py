"""Shared fixtures: a tiny text-only LLM and photographs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from bpo.config.bootstrap import BootstrapConfig, InjectConfig, WeakenConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from tests.bootstrap.jobs import accept_random_text
from tests.tiny import byte_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random text-only Llama with different end tokens for chat turns and documents."""
    torch.manual_seed(0)
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = byte_tokenizer(special, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    directory = tmp_path_factory.mktemp("models") / "llm"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A data folder: nine pictures and a LLaVA annotation file with description and factual questions."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(9):
        pixels = rng.integers(0, 255, (40 + 8 * index, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        question = "Describe this image." if index % 2 else f"How many things are there in photo {index}?"
        answer = "A cat sits on a mat. " * (index + 1) if index % 2 else f"There are {index} things."
        conversation = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"photo-{index}", "image": f"{index}.png", "conversations": conversation})
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture
def make(photos: Path, tiny_llava_dir: Path, tiny_llm_dir: Path) -> Callable[..., Config]:
    """Builds a job over the photographs with a separate random text-only LLM; its groups are written to `folder`."""

    def build(folder: str, *, inject: dict[str, Any] | None = None, **bootstrap: Any) -> Config:
        llm = {"llm": str(tiny_llm_dir), "dtype": "float32", "max_new_tokens": 12} if inject is None else inject
        return Config(
            model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
            data=DataConfig(
                annotations=str(photos / "annotations.json"),
                groups=str(photos / folder / "groups.jsonl"),
                image_root=str(photos),
            ),
            bootstrap=BootstrapConfig(
                inject=InjectConfig(**{"attempts": 1, **llm}),
                **{
                    "sources": ["weaken", "inject"],
                    "batch_size": 4,
                    "weaken": WeakenConfig(temperature=1.0, max_new_tokens=12),
                    **bootstrap,
                },
            ),
        )

    return build


@pytest.fixture(autouse=True)
def keep_what_random_models_say(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_random_text(monkeypatch)
