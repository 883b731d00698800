"""Quantised layers on a GPU: products, gradients, memory, and a policy that trains on FP8 products.

Shape letters: T rows, O output features, I input features.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bpo.config.training import Config, LoraConfig, ModelConfig
from bpo.model import recompute
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers.fp8 import Fp8Linear
from bpo.model.levers.quantized import weight_bytes
from bpo.model.levers.quantized_layers import Int8Linear, Nf4Linear, layers_of, original_weights
from bpo.model.load import load_base, resolve_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from tests.sample_groups import encoder_of, packed_batch, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

CUDA = torch.device("cuda")
KINDS = {"nf4": Nf4Linear, "int8": Int8Linear, "fp8": Fp8Linear}
NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
)
FP8 = pytest.param(
    "fp8",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no FP8 products"
    ),
)


def layer_of(kind: str) -> tuple[Any, torch.Tensor]:
    """A quantised layer of LLaVA-1.5-7B's size, and its weight [O, I]."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4096, 11008, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    weight_OI = layer.weight.to(CUDA)
    before = torch.cuda.memory_allocated()
    KINDS[kind].convert(layer, CUDA, keep_original=False)
    stored = torch.cuda.memory_allocated() - before
    assert stored == pytest.approx(weight_bytes((11008, 4096), kind), rel=0.01)
    return layer, weight_OI


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_product_and_gradient_are_those_of_the_reconstructed_weight(kind: str) -> None:
    layer, weight_OI = layer_of(kind)
    input_TI = torch.randn(777, 4096, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    grad_TO = torch.randn(777, 11008, device=CUDA, dtype=torch.bfloat16)
    (gradient_TI,) = torch.autograd.grad(layer(input_TI), input_TI, grad_TO)
    expected_TO = F.linear(input_TI, layer.dequantized())
    assert torch.equal(layer(input_TI), expected_TO)
    torch.testing.assert_close(gradient_TI, torch.autograd.grad(expected_TO, input_TI, grad_TO)[0])
    assert _relative_error(layer.dequantized(), weight_OI) < {"int8": 0.01, "nf4": 0.11}[kind]


@pytest.mark.parametrize("kind", [FP8])
@pytest.mark.parametrize("rows", [777, 1])
def test_fp8_products_are_as_exact_as_their_factors(kind: str, rows: int) -> None:
    """Two factors, each rounded to a 4-bit significand: 2.6 % rms each for values spread evenly over an octave."""
    layer, weight_OI = layer_of(kind)
    scale_T1 = torch.logspace(-3, 3, rows, device=CUDA)[:, None]  # rows of all sizes, each with its own scale
    input_TI = (torch.randn(rows, 4096, device=CUDA) * scale_T1).bfloat16().requires_grad_()
    grad_TO = torch.randn(rows, 11008, device=CUDA, dtype=torch.bfloat16)
    output_TO = layer(input_TI)
    (gradient_TI,) = torch.autograd.grad(output_TO, input_TI, grad_TO)
    exact_TO = F.linear(input_TI.detach().float(), weight_OI.float())
    per_row_T = (output_TO.float() - exact_TO).norm(dim=1) / exact_TO.norm(dim=1)
    assert 0 < float(per_row_T.detach().max()) < 0.05
    assert _relative_error(gradient_TI, grad_TO.float() @ weight_OI.float()) < 0.05


@pytest.mark.parametrize("kind", ["int8", NF4, FP8])
def test_policy_trains_with_and_without_recomputation(
    tiny_llava_dir: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)
    encoder = encoder_of(tiny_llava_dir, photo_root)
    batch = packed_batch(encoder, three_groups())
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for mode in ("plain", "none", "full", "selective"):
        options = ModelConfig(
            path=str(tiny_llava_dir),
            dtype="bfloat16",
            quantization="none" if mode == "plain" else kind,  # type: ignore[arg-type]
            gradient_checkpointing="none" if mode == "plain" else mode,  # type: ignore[arg-type]
        )
        model = load_base(resolve_model(options, CUDA, for_training=True), keep_original=mode == "none")
        prepare_trainable(model, encoder.family, Config(model=options, lora=LoraConfig(r=4, alpha=8, dropout=0.0)))
        policy = PolicyModel(model.to(CUDA)).train()
        gradients[mode] = _gradients(policy, batch)
        if mode == "none":
            assert len(layers_of(model)) == 14
            with original_weights(model):
                gradients["original"] = _gradients(policy, batch)
    for name, plain in gradients["plain"].items():
        rounding = 2e-2 * float(plain.abs().max())  # attention's backward pass adds in varying order
        torch.testing.assert_close(gradients["original"][name], plain, atol=rounding, rtol=0, msg=name)
        for mode in ("full", "selective"):
            torch.testing.assert_close(gradients[mode][name], gradients["none"][name], atol=rounding, rtol=0, msg=name)
    ours, plain = (torch.cat([g.flatten() for g in gradients[mode].values()]) for mode in ("none", "plain"))
    assert 0.8 < float(F.cosine_similarity(ours.float(), plain.float(), dim=0)) < 1 - 1e-6


def _gradients(policy: PolicyModel, batch: Any) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    with packed_layout(batch.layout):
        policy(**model_inputs(batch.to(CUDA, torch.bfloat16))).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def _relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())
