"""A frozen vision tower apart from the rest of the model, on a real GPU. `-s` prints errors and times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.data.collate import collate_groups
from bpo.data.families import family_of
from bpo.job.launch import Ranks
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.vision.cache import DiskCache, MemoryCache
from bpo.model.vision.tower import FrozenTower
from bpo.records import GroupBatch
from bpo.training.features import StepFeatures
from tests.sample_groups import encode_all, encoder_of, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

# Error against fp64 at most this share above that of the tower in each micro-batch, plus an epsilon.
SHARE, EPSILON = 1.1, 2e-3


class Engine:
    """A policy on a GPU without DeepSpeed."""

    ranks, is_partitioned, dtype = Ranks(), False, torch.bfloat16

    def __init__(self, policy: PolicyModel):
        self.policy, self.device, self.num_calls = policy, torch.device("cuda", torch.cuda.current_device()), 0

    def encode_images(self, entries: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        self.num_calls += 1
        return self.policy.tower.encode(entries)


def policy_of(directory: Path) -> PolicyModel:
    """In bfloat16, with a frozen tower and a trained projector."""
    config = ModelConfig(path=str(directory), dtype="bfloat16", attention="sdpa")
    policy = PolicyModel(load_model(config, for_training=True).to("cuda")).train()
    policy.model.get_submodule(family_of(policy.model.config).vision_module).requires_grad_(False)
    for name in family_of(policy.model.config).projector_modules:
        policy.model.get_submodule(name).requires_grad_(True)
    return policy


def micro_batches(directory: Path, photos: Path) -> list[GroupBatch]:
    encoder = encoder_of(directory, photos)
    batches = [collate_groups([group], encoder.family) for group in encode_all(encoder, three_groups())]
    return [replace(batch, image_keys=encoder.family.entry_keys(batch.image_inputs)) for batch in batches]


def results(policy: PolicyModel, batches: list[GroupBatch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of a step, and the accumulated gradients of a weighted sum."""
    policy.zero_grad()
    pieces = []
    for batch in batches:
        with packed_layout(batch.layout):
            logp_N = policy(**model_inputs(batch))
            (logp_N * torch.linspace(-1, 1, len(logp_N), device=logp_N.device)).sum().backward()
        pieces.append(logp_N.detach().double())
    grads = {n: p.grad.double().cpu() for n, p in policy.named_parameters() if p.grad is not None}
    return torch.cat(pieces).cpu(), grads


def distance(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Root mean square over the parameters of the error relative to the norm of a parameter's gradient."""
    errors = [float((gradients[name] - value).norm() / (value.norm() + 1e-12)) for name, value in exact.items()]
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_log_probs_and_gradients_in_bfloat16(
    family_dir: Callable[[str], Path], photo_root: Path, tmp_path: Path, name: str
) -> None:
    policy, batches = policy_of(family_dir(name)), micro_batches(family_dir(name), photo_root)
    family = family_of(policy.model.config)
    on_gpu = [batch.to(torch.device("cuda"), torch.bfloat16) for batch in batches]
    on_host = [batch.to(torch.device("cpu"), torch.float64) for batch in on_gpu]  # fp64 without the GPU's kernels
    exact_N, exact = results(copy.deepcopy(policy).cpu().double(), on_host)
    plain_N, plain = results(policy, on_gpu)
    for cache in (None, MemoryCache(1e9), DiskCache(tmp_path, {}, torch.bfloat16, 1e9)):
        engine = Engine(policy)
        features = StepFeatures(engine, family, 65536, cache)  # type: ignore[arg-type]
        step_N, step = results(policy, list(features(on_gpu)))
        assert engine.num_calls == 1
        error, allowed = float((step_N - exact_N).abs().max()), float((plain_N - exact_N).abs().max())
        print(f"{name}: log-probs: {error:.2e} of the step, {allowed:.2e} of micro-batches")
        assert error <= SHARE * allowed + EPSILON
        assert step.keys() == plain.keys()
        own, other = distance(step, exact), distance(plain, exact)
        print(f"{name}: gradients: {own:.2e} of the step, {other:.2e} of micro-batches")
        assert own <= SHARE * other + EPSILON
        if isinstance(cache, MemoryCache):  # the second epoch
            again_N, _ = results(policy, list(features(on_gpu)))
            assert engine.num_calls == 1 and torch.equal(again_N, step_N)


def tower_of_llava() -> tuple[Any, Any]:
    """CLIP ViT-L/14 at 336 px, as in LLaVA-1.5, in front of a small language model; random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-2)
    with torch.device("cuda"):
        model = LlavaForConditionalGeneration(config)
    return model.to(torch.bfloat16).eval(), family_of(config)


def test_real_shapes_round_alike_in_batches_of_any_size() -> None:
    """24 images, alone, 4 at a time and in one call."""
    model, family = tower_of_llava()
    tower = FrozenTower(model, family)
    pixels = torch.randn(24, 3, 336, 336, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    entries = family.entries({"pixel_values": pixels.bfloat16()})
    found, seconds = {}, {}
    for size in (1, 4, 24):
        for _ in range(2):  # the first warms up
            torch.cuda.synchronize()
            started = time.perf_counter()
            parts = [tower.encode(entries[i : i + size]) for i in range(0, 24, size)]
            torch.cuda.synchronize()
            seconds[size] = time.perf_counter() - started
        found[size] = torch.stack([entry for part in parts for entry in part])
    wide = [{"pixel_values": entry["pixel_values"].double()} for entry in entries]
    exact = torch.stack([entry for entry in FrozenTower(model.double(), family).encode(wide)])
    errors = {size: float((value.double() - exact).norm() / exact.norm()) for size, value in found.items()}
    for size in (1, 4, 24):
        equal = float((found[size] == found[1]).float().mean())
        print(f"CLIP-L/336, {size} per call: {seconds[size]:.4f} s, error {errors[size]:.3e}, {equal:.1%} bit-equal")
    assert max(errors.values()) <= SHARE * min(errors.values())
    assert exact.shape == (24, 1, 1, 576, 1024)
