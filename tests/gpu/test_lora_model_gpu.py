"""A model whose adapted layers run on the Triton kernels, against fp64 and against PEFT's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model import recompute
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers import lora
from bpo.model.levers.choice import Lever
from bpo.model.levers.lora import adapter_dropout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from tests.sample_groups import encoder_of, packed_batch, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = 2**40 + 3  # both halves of the key


@pytest.fixture(scope="module")
def batch(tiny_llava_dir: Path, photo_root: Path) -> GroupBatch:
    return packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())


def adapted(directory: Path, kernel: str, mode: str = "none", dropout: float = 0.0) -> Any:
    """In bfloat16, with an adapter that is not zero."""
    config = Config(
        model=ModelConfig(path=str(directory), dtype="bfloat16", gradient_checkpointing=mode),  # type: ignore[arg-type]
        trainable=TrainableConfig(projector="frozen"),
        lora=LoraConfig(r=8, alpha=16, dropout=dropout),
    )
    model = load_model(config.model, for_training=True)
    family = family_of(model.config)
    prepare_trainable(model, family, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    lora.install(model, family, config, Lever(kernel, ""))
    return model.train()


def run(model: Any, batch: GroupBatch, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Log-probs and gradients of a weighted sum of them, in fp64."""
    policy = PolicyModel(model.to(DEVICE, dtype))
    with packed_layout(batch.layout), adapter_dropout(SEED, DEVICE):
        logp_N = policy(**model_inputs(batch.to(DEVICE, dtype)))
        (logp_N * torch.linspace(-1, 1, len(logp_N), device=DEVICE)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().double() for name, value in {"logp": logp_N, **gradients}.items()}


def error(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Root mean square over tensors of the relative error."""
    assert actual.keys() == exact.keys() and len(exact) == 1 + 2 * 7 * 2
    squares = [float(((actual[n] - v).norm() / v.norm()) ** 2) for n, v in exact.items()]
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("kernel", ["fused", "addmm"])
def test_log_probs_and_gradients_are_as_exact_as_those_of_peft(tiny_llava_dir: Path, batch, kernel: str) -> None:
    exact = run(adapted(tiny_llava_dir, "peft"), batch, torch.float64)
    eager, actual = (error(run(adapted(tiny_llava_dir, name), batch), exact) for name in ("peft", kernel))
    assert actual <= 1.1 * eager + 1e-4


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("kernel", ["fused", "addmm"])
def test_dropout_has_the_masks_of_the_plain_twin(tiny_llava_dir, batch, monkeypatch, kernel: str, mode: str) -> None:
    """fp64 runs on the twin. Another mask differs by more than half."""
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)
    exact = run(adapted(tiny_llava_dir, "addmm", dropout=0.3), batch, torch.float64)
    eager = error(
        run(adapted(tiny_llava_dir, "peft"), batch), run(adapted(tiny_llava_dir, "peft"), batch, torch.float64)
    )
    assert error(run(adapted(tiny_llava_dir, kernel, mode, dropout=0.3), batch), exact) <= 2 * eager + 1e-4


@pytest.mark.parametrize("kernel", ["fused", "addmm"])
def test_a_layer_does_not_wait_for_the_device(tiny_llava_dir: Path, kernel: str) -> None:
    model = adapted(tiny_llava_dir, kernel, dropout=0.3).to(DEVICE)
    attention = next(module for module in model.modules() if hasattr(getattr(module, "q_proj", None), "lora_A"))
    x_TD = torch.randn(64, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for sync in ("default", "error"):  # first compiles
        torch.cuda.set_sync_debug_mode(sync)
        try:
            with adapter_dropout(SEED, DEVICE):
                outputs = [layer(x_TD) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
                torch.autograd.backward([output.sum() for output in outputs])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x_TD.grad is not None
