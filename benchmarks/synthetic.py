"""Inputs of the step benchmarks: a small LLaVA with random weights, packed random batches, machine description."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bpo.config.training import Config, DataConfig, LoraConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, EncodedPrompt
from bpo.data.families import family_of
from bpo.engine import TrainingEngine, deepspeed_config, partitioned_loading
from bpo.job.launch import Ranks
from bpo.job.run_record import version_of
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from bpo_kernels.provenance import source_commit

IMAGE_TOKEN = 3
IMAGE_TOKENS = 16
VOCABULARY = 2048


def machine_of_run() -> dict[str, Any]:
    """Hardware, versions and commit, recorded with every committed figure."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, no GPU",
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "transformers", "deepspeed", "peft")},
        "commit": source_commit("bpo", "kernels", "benchmarks", "ds_configs"),
    }


def small_llava(directory: Path, *, hidden: int = 128, layers: int = 2) -> Path:
    """Saves weights and configuration without a processor, since the batches consist of token ids."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1 << 17,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=IMAGE_TOKENS
    )
    LlavaForConditionalGeneration(config).to(torch.float32).save_pretrained(directory)
    return directory


def config_for(
    model: Path,
    output_dir: Path,
    *,
    language: str = "full",
    gradient_checkpointing: str = "none",
    ds_config: str = "ds_configs/zero2.json",
) -> Config:
    return Config(
        model=ModelConfig(path=str(model), dtype="float32", gradient_checkpointing=gradient_checkpointing),  # type: ignore[arg-type]
        data=DataConfig(num_workers=0),
        lora=LoraConfig(r=16, alpha=32, dropout=0.05),
        trainable=TrainableConfig(language=language),  # type: ignore[arg-type]
        train=TrainConfig(output_dir=str(output_dir), ds_config=ds_config, lr=1e-5),
    )


def policy_of(config: Config) -> PolicyModel:
    model = load_model(config.model, for_training=True)
    prepare_trainable(model, family_of(model.config), config)
    return PolicyModel(model).train()


def trainer_of(config: Config) -> TrainingEngine:
    """The engine as bpo/train.py builds it, on one rank; call `engine.init_distributed` first."""
    settings = deepspeed_config(config.train, torch.float32, 1)
    with partitioned_loading(settings):
        policy = policy_of(config)
    return TrainingEngine(policy, family_of(policy.model.config), config, settings, Ranks())


def random_batch(policy: PolicyModel, num_groups: int, prefix_tokens: int, response_tokens: int) -> GroupBatch:
    """Packs `num_groups` groups of one image and two completions; the reference differs from the policy."""
    generator = torch.Generator().manual_seed(num_groups * prefix_tokens)
    family = family_of(policy.model.config)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, VOCABULARY, (count,), generator=generator).tolist())

    groups = []
    for number in range(num_groups):
        pixels = torch.randn(1, 3, 56, 56, generator=generator)
        prefix = (IMAGE_TOKEN,) * IMAGE_TOKENS + ids(prefix_tokens - IMAGE_TOKENS)
        prompt = EncodedPrompt(f"g{number}", prefix, {"pixel_values": pixels})
        groups.append(EncodedGroup(prompt, (ids(response_tokens), ids(response_tokens)), (1.0, 0.0)))
    batch = collate_groups(groups, family)
    return batch.with_reference(torch.full(batch.target_N.shape, -7.0))


def interleaved_seconds(
    cases: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each case in every round, after a warm-up round; cases are interleaved, so that drift affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in cases.items():
            started = clock()
            run()
            if number:
                seconds[name].append(clock() - started)
    return seconds
