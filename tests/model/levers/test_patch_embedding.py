"""Patch embeddings as matrix products: values, gradients, names, and which towers get them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config, ModelConfig, TrainableConfig
from bpo.data.families import FAMILIES
from bpo.model.levers import patch_embedding
from bpo.model.levers.choice import Lever
from bpo.model.load import load_model, resolve_model
from tests.sample_groups import encoder_of, group, packed_batch
from tests.trained_policy import assert_equal_to_rounding, policy_of, trained


def options(directory: Path, **model: Any) -> Config:
    trainable = TrainableConfig(language="full", vision="full")
    return Config(model=ModelConfig(path=str(directory), dtype="float32", **model), trainable=trainable)


def gemm_of(family: Any, config: Config) -> Callable[[Any], str]:
    return lambda model: patch_embedding.install(model, family, config, Lever("gemm", ""))


# One family for each vision tower.
TOWERS = ("gemma3", "idefics3", "internvl", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")


@pytest.mark.parametrize("family_name", TOWERS)
def test_log_probs_and_gradients_are_those_of_the_convolution(family_dir, photo_root, family_name: str) -> None:
    directory = family_dir(family_name)
    encoder = encoder_of(directory, photo_root)
    batch = packed_batch(encoder, [group("a", "a cat", "a dog")])
    config = options(directory)
    plain = policy_of(config, encoder.family, torch.nn.Module.double)
    gemm = policy_of(config, encoder.family, lambda model: gemm_of(encoder.family, config)(model.double()))
    expected = trained(plain, batch)
    assert_equal_to_rounding(trained(gemm, batch), expected, 1e-9)
    assert list(gemm.state_dict()) == list(plain.state_dict())
    (weight,) = (gradient for gradient in expected.gradients.values() if gradient.dim() in (4, 5))
    assert weight.abs().max() > 0


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_layers_give_the_same_gradients(tiny_qwen_dir: Path, photo_root: Path, mode: str) -> None:
    encoder = encoder_of(tiny_qwen_dir, photo_root)
    batch = packed_batch(encoder, [group("a", "a cat", "a dog")])
    config, recomputing = options(tiny_qwen_dir), options(tiny_qwen_dir, gradient_checkpointing=mode)
    install = gemm_of(encoder.family, config)
    _, expected = trained(policy_of(config, encoder.family, install), batch)
    _, gradients = trained(policy_of(recomputing, encoder.family, install), batch)
    assert [name for name in expected if not torch.equal(gradients[name], expected[name])] == []


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (torch.nn.Conv3d(3, 24, (2, 14, 14), stride=(2, 14, 14)), (5, 3, 2, 14, 14)),
        (torch.nn.Conv2d(3, 24, 14, stride=14, bias=False), (2, 3, 33, 57)),  # incomplete patches at two edges
        (torch.nn.Conv2d(3, 24, 14, stride=14, padding="valid"), (0, 3, 28, 28)),
    ],
    ids=["cut", "images", "empty"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_the_convolution(conv: torch.nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    exact, plain, gemm = (make_conv(conv, kind) for kind in (torch.float64, dtype, dtype))
    holder = torch.nn.ModuleDict({"tower": torch.nn.ModuleDict({"conv": gemm})})
    assert install_in(holder) == "tower.conv"
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected, convolved, actual = exact(pixels.double()), plain(pixels), gemm(pixels)
    assert actual.shape == convolved.shape and actual.dtype == dtype
    if not shape[0]:
        return
    errors = [float((out.double() - expected).abs().max() / expected.abs().max()) for out in (actual, convolved)]
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 4


def make_conv(conv: Any, dtype: torch.dtype) -> torch.nn.Module:
    bias = conv.bias is not None
    copy = type(conv)(3, 24, conv.kernel_size, stride=conv.stride, padding=conv.padding, bias=bias)
    copy.load_state_dict(conv.state_dict())
    return copy.to(torch.bfloat16).to(dtype)


def install_in(holder: torch.nn.Module) -> str:
    class Tower:
        vision_module = "tower"

    return patch_embedding.install(holder, Tower, Config(), Lever("gemm", ""))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options_of_conv",
    [{"stride": 7}, {"stride": 14, "padding": 1}, {"stride": 14, "groups": 3}, {"stride": 14, "dilation": 2}],
    ids=lambda options: list(options)[-1],
)
def test_other_convolutions_are_refused(options_of_conv: dict[str, int]) -> None:
    conv = torch.nn.Conv2d(3, 24, 14, **options_of_conv)  # type: ignore[arg-type]
    holder = torch.nn.ModuleDict({"tower": torch.nn.ModuleDict({"conv": conv})})
    with pytest.raises(ValueError, match=r"model\.patch_embedding is gemm, but tower has no convolution .* set it to"):
        install_in(holder)
    assert type(conv) is torch.nn.Conv2d


def test_auto_takes_it_where_no_pixel_moves(family_dir) -> None:
    chosen = {}
    for name in sorted(FAMILIES):
        config = options(family_dir(name))
        chosen[name] = patch_embedding.choose(config, resolve_model(config.model, for_training=True)).value
    assert {name for name, value in chosen.items() if value == "gemm"} == {name for name in chosen if "qwen" in name}
    config = options(family_dir("qwen2_vl"), patch_embedding="conv")
    assert patch_embedding.choose(config, resolve_model(config.model)).value == "conv"


def test_another_model_of_the_process_keeps_its_convolution(tiny_qwen_dir: Path) -> None:
    config = options(tiny_qwen_dir)
    one, other = (load_model(config.model) for _ in range(2))
    patch_embedding.install(one, FAMILIES["qwen2_5_vl"](one.config), config, Lever("gemm", ""))
    assert type(other.model.visual.patch_embed.proj) is torch.nn.Conv3d
    assert isinstance(one.model.visual.patch_embed.proj, torch.nn.Conv3d)
    assert repr(one) == repr(other).replace("Conv3d", "_GemmConv3d")
