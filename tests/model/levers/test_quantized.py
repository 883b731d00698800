"""Quantised weights: products and gradients against the reconstructed weights, and what is refused.

Shape letters: T rows, O output features, I input features, N response tokens.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.model import recompute
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.generate import generate_answers
from bpo.model.levers import quantized
from bpo.model.levers.fp8 import FORMAT, Fp8Linear, quantize_rows
from bpo.model.levers.quantized_layers import (
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    drop_originals,
    layers_of,
    original_weights,
)
from bpo.model.load import load_base, load_model, resolve_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.training.flops import model_flops
from tests.sample_groups import encoder_of, packed_batch, three_groups

CPU = torch.device("cpu")
NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
)
KINDS = {"nf4": Nf4Linear, "int8": Int8Linear, "fp8": Fp8Linear}


def layer_of(kind: str, sizes: tuple[int, int], dtype: torch.dtype, *, bias: bool = False) -> tuple[Any, torch.Tensor]:
    """A quantised layer, and the weight [O, I] that it was made from, whose rows have different sizes."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(sizes[1], sizes[0], bias=bias).to(dtype).requires_grad_(False)
    scale_O1 = torch.logspace(-3, 1, sizes[0])[:, None]
    layer.weight.copy_(torch.randn(sizes, generator=generator) * scale_O1)
    weight_OI = layer.weight.clone()
    KINDS[kind].convert(layer, CPU, keep_original=False)
    return layer, weight_OI


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", NF4])
@pytest.mark.parametrize("sizes", [(96, 64), (33, 192)])
def test_product_and_gradient_are_those_of_the_reconstructed_weight(kind: str, sizes, dtype) -> None:
    layer, weight_OI = layer_of(kind, sizes, dtype, bias=True)
    input_TI = torch.randn(2, 5, sizes[1]).to(dtype).requires_grad_()
    same_TI = input_TI.detach().clone().requires_grad_()
    output, expected = layer(input_TI), F.linear(same_TI, layer.dequantized(), layer.bias)
    assert torch.equal(output, expected) and layer.weight.element_size() == 1
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(input_TI.grad, same_TI.grad)
    error_OI = (layer.dequantized() - weight_OI).float()
    if kind == "int8":  # half a step, and what rounding the scale and the product to bfloat16 adds
        bound_O1 = weight_OI.float().abs().amax(1, keepdim=True) * (0.5 / 127 + (0 if dtype == torch.float32 else 2e-2))
        assert bool((error_OI.abs() <= 1.001 * bound_O1).all())
    else:  # blocks of rows of one size, so that none is drowned by another
        assert float(error_OI.norm() / weight_OI.float().norm()) < 0.11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_within_the_rounding_of_their_factors(dtype) -> None:
    """e4m3 has a 4-bit significand: each factor is off by at most 2^-4, relative."""
    layer, weight_OI = layer_of("fp8", (48, 32), dtype)
    input_TI = (torch.randn(2, 5, 32) * torch.logspace(-2, 2, 5)[:, None]).to(dtype).requires_grad_()
    output = layer(input_TI)
    grad = torch.randn(output.shape).to(dtype)
    output.backward(grad)
    for ours, left, right in ((output, input_TI.detach(), weight_OI.t()), (input_TI.grad, grad, weight_OI)):
        exact, sizes = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        assert bool(((ours - exact).abs() <= 0.13 * sizes).all()) and not torch.equal(ours.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_codes_never_overflow_and_scales_are_exact(dtype) -> None:
    values_RC = torch.tensor([[448.0, -447.0], [449.0, 1.0], [0.0, 0.0], [3e-30, 1e-30], [1e37, -3e38]]).to(dtype)
    codes_RC, scale_R1 = quantize_rows(values_RC)
    assert codes_RC.dtype == FORMAT and bool(codes_RC.float().isfinite().all())
    assert torch.equal(scale_R1, torch.exp2(torch.log2(scale_R1).round()))
    torch.testing.assert_close(codes_RC.float() * scale_R1, values_RC.float(), rtol=2**-4, atol=1e-32)


def test_weights_that_are_not_finite_are_named(tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelConfig(path=str(tiny_llava_dir), dtype="float32")
    model = load_model(options)
    with torch.no_grad():
        model.get_submodule("model.language_model.layers.1.mlp.up_proj").weight[3, 4] = float("nan")
    resolved = resolve_model(replace(options, quantization="int8"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: .*not finite"):
        quantized.quantize(model, resolved, keep_original=False)


def policy_of(directory: Path, kind: str, *, reconstructed: bool = False, **options: Any) -> Any:
    """A policy that trains on quantised weights; or a plain one with the weights that these stand for."""
    model_options = ModelConfig(path=str(directory), dtype="float32", quantization=kind, **options)  # type: ignore[arg-type]
    config = Config(model=model_options, lora=LoraConfig(r=2, alpha=64, dropout=0.0))
    encoder = encoder_of(directory, directory)
    model = load_base(resolve_model(model_options, for_training=True), keep_original=True)
    if reconstructed:
        plain = load_base(resolve_model(replace(model_options, quantization="none"), for_training=True))
        with torch.no_grad():
            for name, layer in model.named_modules():
                if isinstance(layer, QuantizedLinear):
                    plain.get_submodule(name).weight.copy_(layer.dequantized())
        model = plain
    prepare_trainable(model, encoder.family, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return PolicyModel(model).train()


def trained(policy: PolicyModel, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with packed_layout(batch.layout):
        logp_N = policy(**model_inputs(batch.to(CPU, torch.float32)))
        (logp_N * torch.arange(1, len(logp_N) + 1)).sum().backward()
    return logp_N.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.fixture(params=["llava", "qwen"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_policy_trains_as_one_with_the_reconstructed_weights(directory, photo_root, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)  # tiny layers count as large
    batch = packed_batch(encoder_of(directory, photo_root), three_groups())
    plain = policy_of(directory, kind, reconstructed=True)
    expected_N, expected = trained(plain, batch)
    for mode in ("none", "full", "selective"):
        policy = policy_of(directory, kind, gradient_checkpointing=mode)
        logp_N, gradients = trained(policy, batch)
        torch.testing.assert_close(logp_N, expected_N, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected.keys() and len(expected) > 20
        for name, gradient in gradients.items():
            bound = 1e-5 * float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=bound)
    assert policy.state_dict().keys() == plain.state_dict().keys()
    family = encoder_of(directory, directory).family
    assert model_flops(policy.model, family) == model_flops(plain.model, family)


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_unquantised_weights_are_at_hand_until_they_are_dropped(tiny_llava_dir, photo_root, kind: str) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root)
    batch = packed_batch(encoder, three_groups())
    policy, plain = (policy_of(tiny_llava_dir, which) for which in (kind, "none"))
    expected_N, _ = trained(plain, batch)
    with original_weights(policy.model):
        assert torch.equal(trained(policy, batch)[0], expected_N)
    assert not torch.allclose(trained(policy, batch)[0], expected_N, atol=1e-3)
    drop_originals(policy.model)
    assert len(layers_of(policy.model)) == 14
    assert all(layer.original_OI is None for layer in layers_of(policy.model))


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_a_quantised_model_answers(tiny_llava_dir, photo_root, kind: str) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root)
    model = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32", quantization=kind))  # type: ignore[arg-type]
    plain = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32"))
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                plain.get_submodule(name).weight.copy_(layer.dequantized())
    prompt = encoder.encode_group(three_groups()[0]).prompt
    answers = [
        generate_answers(one, encoder, [prompt], max_new_tokens=6, temperature=0.0, top_p=1.0, seeds=[0])
        for one in (model, plain)
    ]
    assert answers[0] == answers[1]


LORA_OPTIONS = Config(model=ModelConfig(quantization="int8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": TrainableConfig(language="full")}, "set trainable.language to lora"),
        ({"trainable": TrainableConfig(language="frozen")}, "set trainable.language to lora"),
        ({"lora": LoraConfig(variant="dora")}, "set lora.variant to lora"),
        ({"model": ModelConfig(quantization="fp8")}, "needs a GPU with FP8 products"),
    ],
)
def test_what_cannot_be_quantised_is_refused(tiny_llava_dir: Path, change: dict[str, Any], message: str) -> None:
    config = replace(LORA_OPTIONS, **change)
    config = replace(config, model=replace(config.model, path=str(tiny_llava_dir)))
    with pytest.raises(ValueError, match=message):
        quantized.choose(config, resolve_model(config.model, for_training=True))


def test_nf4_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bpo\[qlora\]'"):
        quantized.check_available("nf4", CPU, torch.float32)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("int8", 8.016), ("fp8", 8.016)])
def test_size_of_a_weight(kind: str, bits: float) -> None:
    assert 8 * quantized.weight_bytes((1024, 1024), kind) / 1024**2 == pytest.approx(bits, abs=1e-3)
