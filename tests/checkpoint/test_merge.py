"""Rounding of merged weights: what each kind keeps of a small change, against exact sums in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.checkpoint.merge import ROUNDINGS, WeightChange, merge_into, round_stochastic
from bpo.config.training import Config, ModelConfig
from bpo.data.families import family_of
from bpo.model.load import load_model
from bpo.model.trainable import prepare_trainable
from tests.trained_checkpoint import LORA, perturbed

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_gives_a_neighbour_and_the_exact_mean(dtype: torch.dtype) -> None:
    values = torch.tensor([0.02013, -0.02013, 1.0, 0.0, 3e-7, -65000.3, 0.0078124])
    draws = torch.stack([round_stochastic(values, dtype, f"draw {number}").double() for number in range(4000)])
    nearest = values.to(dtype).double()
    above, below = torch.nextafter(values.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double(), nearest
    spacing = (above - below).abs()
    assert bool(((draws - values.double()).abs() <= spacing).all())
    # Standard error of the mean of a two-point distribution: at most spacing / 2 / sqrt(4000), times 5.
    assert bool(((draws.mean(0) - values.double()).abs() <= 0.04 * spacing).all())
    exact = nearest == values.double()
    assert exact.sum() >= 2 and bool((draws[:, exact] == nearest[exact]).all())  # what needs no rounding stays


def test_stochastic_rounding_depends_on_the_name_alone() -> None:
    weight = torch.randn(8, 8)
    assert torch.equal(round_stochastic(weight, torch.bfloat16, "a"), round_stochastic(weight, torch.bfloat16, "a"))
    assert not torch.equal(round_stochastic(weight, torch.bfloat16, "a"), round_stochastic(weight, torch.bfloat16, "b"))


@pytest.mark.parametrize(("rounding", "low", "high"), [("nearest", 0.2, 0.4), ("stochastic", 0.95, 1.05)])
def test_a_change_below_the_spacing_survives_only_stochastic_rounding(rounding: str, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(512, 512, generator=generator)).bfloat16()
    trained = base.float() + 1e-5 * torch.randn(512, 512, generator=generator)
    fate = WeightChange()
    fate.add("w", base, trained, ROUNDINGS[rounding](trained, torch.bfloat16, "w"))
    figures = fate.to_json()
    assert low < figures["survived"] < high
    assert figures["worst_tensor"] == ("w" if figures["survived"] < 1 else "")
    assert figures["rms_change"] == pytest.approx(1e-5, rel=0.02)
    if rounding == "nearest":
        assert figures["unchanged_share"] > 0.8


def test_no_change_has_no_share() -> None:
    fate = WeightChange()
    fate.add("w", torch.ones(3), torch.ones(3), torch.ones(3))
    assert fate.to_json()["survived"] is None and fate.to_json()["unchanged_share"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_exact_sum_rounded_once(tiny_llava_dir: Path, dtype: torch.dtype) -> None:
    """PEFT's merge in bfloat16 rounds the product first and differs."""
    config = Config(model=ModelConfig(path=str(tiny_llava_dir), dtype="bfloat16"), lora=LORA)
    state = {n: p.detach() for n, p in perturbed(config, 0.05).named_parameters() if p.requires_grad}
    base, model = load_model(config.model), load_model(config.model)
    merge_into(model, state, scale=LORA.alpha / LORA.r, dtype=dtype, rounding="nearest")
    parameters, before = dict(model.named_parameters()), dict(base.named_parameters())
    layer = "model.language_model.layers.1.mlp.down_proj"
    product = state[f"{layer}.lora_B.default.weight"].double() @ state[f"{layer}.lora_A.default.weight"].double()
    exact = before[f"{layer}.weight"].double() + 2.0 * product
    bound = 2**-8 if dtype == torch.bfloat16 else 2**-22
    error = (parameters[f"{layer}.weight"].double() - exact).abs()
    assert bool((error <= bound * exact.abs() + 1e-7).all())
    projector = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(parameters[projector], state[projector].to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    frozen = "model.language_model.embed_tokens.weight"
    assert torch.equal(parameters[frozen], before[frozen].to(dtype))


def test_merging_is_the_model_that_trained(tiny_llava_dir: Path) -> None:
    config = Config(model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"), lora=LORA)
    trained = perturbed(config, 0.05)
    state = {n: p.detach() for n, p in trained.named_parameters() if p.requires_grad}
    merged = load_model(config.model)
    merge_into(merged, state, scale=LORA.alpha / LORA.r, dtype=torch.float32, rounding="stochastic")
    prepare_trainable(base := load_model(config.model), family_of(merged.config), config)
    ids_BT = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        logits, expected, untrained = (m(input_ids=ids_BT).logits for m in (merged, trained, base.eval()))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert float((untrained - expected).abs().max()) > 0.01
