"""Selective recomputation with the attention of a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.model import recompute
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from tests.sample_groups import encoder_of, packed_batch, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

# Relative to a gradient's largest entry: attention's backward pass has atomic additions in varying order.
TOLERANCE = 2e-2


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_the_same_gradients_in_bfloat16(tiny_llava_dir: Path, photo_root: Path, monkeypatch, mode: str) -> None:
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)
    device = torch.device("cuda", torch.cuda.current_device())
    batch = packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())
    gradients = {}
    for name in ("none", mode):
        config = ModelConfig(path=str(tiny_llava_dir), dtype="bfloat16", gradient_checkpointing=name)  # type: ignore[arg-type]
        policy = PolicyModel(load_model(config, for_training=True).to(device)).train()
        with packed_layout(batch.layout):
            logp_N = policy(**model_inputs(batch.to(device, torch.bfloat16)))
            logp_N.sum().backward()
        gradients[name] = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    for name, expected in gradients["none"].items():
        bound = TOLERANCE * float(expected.abs().max())
        torch.testing.assert_close(gradients[mode][name], expected, atol=bound, rtol=0, msg=name)
