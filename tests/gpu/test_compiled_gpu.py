"""Decoder layers compiled for a real GPU, with its attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.row_lengths import pad_row
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers import compiled
from bpo.model.load import load_base, resolve_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from tests.sample_groups import encoder_of, packed_batch, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA


def trained(policy: PolicyModel, batch: GroupBatch) -> dict[str, torch.Tensor]:
    """Log-probs and gradients, by name."""
    torch.manual_seed(3)
    policy.zero_grad()
    with packed_layout(batch.layout):
        logp_N = policy(**model_inputs(batch.to(torch.device("cuda"), policy.model.dtype)))
        logp_N.sum().backward()
    results = {n: p.grad.double() for n, p in policy.named_parameters() if p.grad is not None}
    return results | {"logp": logp_N.detach().double()}


def policy_of(directory: Path, photo_root: Path, dropout: float = 0.0, **options: str) -> PolicyModel:
    model = ModelConfig(path=str(directory), **options)  # type: ignore[arg-type]
    lora = LoraConfig(r=4, alpha=64, dropout=dropout)
    config = Config(model=model, trainable=TrainableConfig(language="lora"), lora=lora)
    encoder = encoder_of(directory, photo_root)
    resolved = resolve_model(model, torch.device("cuda", torch.cuda.current_device()), for_training=True)
    loaded = load_base(resolved)
    prepare_trainable(loaded, encoder.family, config)
    compiled.install(loaded, encoder.family, config, compiled.choose(config, resolved))
    for name, parameter in loaded.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return PolicyModel(loaded).to(resolved.device).train()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_in_bfloat16_as_accurate_as_the_plain_path(tiny_qwen_dir: Path, photo_root: Path, checkpointing: str) -> None:
    encoder = encoder_of(tiny_qwen_dir, photo_root)
    batch = pad_row(packed_batch(encoder, three_groups()), (256, 320), encoder.family)
    truth = trained(policy_of(tiny_qwen_dir, photo_root, dtype="float32", attention="sdpa"), batch)
    errors = {}
    for value in ("none", "layers"):
        policy = policy_of(
            tiny_qwen_dir, photo_root, dtype="bfloat16", compile=value, gradient_checkpointing=checkpointing
        )
        result = trained(policy, batch)
        # In all, as single gradients of a tiny model are as inaccurate as chance wants.
        errors[value] = sum(float((result[n] - truth[n]).norm() / truth[n].norm()) for n in truth) / len(truth)
        assert value == "none" or type(policy.model.get_submodule(encoder.family.language_module).layers[0]).compiled
    assert errors["layers"] <= 1.1 * errors["none"] + 2e-3, errors


def test_dropout_is_drawn_again_in_the_backward_pass(tiny_qwen_dir: Path, photo_root: Path) -> None:
    """With and without recomputation, the compiled layers have the same masks."""
    encoder = encoder_of(tiny_qwen_dir, photo_root)
    batch = pad_row(packed_batch(encoder, three_groups()), (256,), encoder.family)
    kept, again = (
        trained(
            policy_of(tiny_qwen_dir, photo_root, 0.3, dtype="float32", compile="layers", gradient_checkpointing=mode),
            batch,
        )
        for mode in ("none", "full")
    )
    for name, expected in kept.items():
        bound = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(again[name], expected, atol=bound, rtol=0, msg=name)
