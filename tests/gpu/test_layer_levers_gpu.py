"""Liger's layer kernels and patch embeddings as matrix products, on a real GPU.

    pytest -s tests/gpu/test_layer_levers_gpu.py      (-s prints the times)

Shape letters: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo

from bpo.config.training import Config, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model import recompute
from bpo.model.levers import layer_kernels, patch_embedding
from bpo.model.levers.choice import Lever
from bpo.model.load import load_model
from tests.sample_groups import encoder_of, packed_batch, three_groups
from tests.trained_policy import policy_of, trained

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

CUDA = torch.device("cuda")
LIGER = Lever("liger", "")
TOKENS, WIDTH = 2048, 2048  # 16 heads: enough rows for Liger's kernels that take several rows at once
SIZES = {
    "vocab_size": 8,
    "hidden_size": WIDTH,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 128, "query_pre_attn_scalar": 128, "layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}


def text_model(kind: str) -> torch.nn.Module:
    """Two decoder layers in float64, whose values bfloat16 can hold."""
    import transformers as hf

    configs = {
        "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**SIZES)),
        "gemma3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**SIZES | GEMMA)),
        "qwen2_5_vl": lambda: hf.Qwen2_5_VLTextModel(hf.Qwen2_5_VLTextConfig(**SIZES, **MROPE)),
        "qwen3_vl": lambda: hf.Qwen3VLTextModel(hf.Qwen3VLTextConfig(**SIZES, head_dim=128, **MROPE)),
    }
    torch.manual_seed(0)
    with torch.device(CUDA):
        text = configs[kind]()
    for name, parameter in text.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if kind == "gemma3" else 1.0, std=0.2)
    return text.bfloat16().double()


def run(text: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states and gradients of a random function of them."""
    generator = torch.Generator(CUDA).manual_seed(0)
    embeds_BTD, weight_BTD = torch.randn(2, 1, TOKENS, WIDTH, generator=generator, device=CUDA).bfloat16().to(dtype)
    embeds_BTD.requires_grad_()
    text.zero_grad()
    hidden_BTD = text(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
    (hidden_BTD * weight_BTD).sum().backward()
    gradients = {n: p.grad for n, p in text.named_parameters() if p.grad is not None}
    return {"hidden": hidden_BTD.detach(), "embeds": embeds_BTD.grad} | gradients  # type: ignore[dict-item]


def with_liger(text: torch.nn.Module) -> torch.nn.Module:
    pytest.importorskip("liger_kernel")
    layer_kernels.install(text, SimpleNamespace(language_module=""), Config(), LIGER)  # type: ignore[arg-type]
    return text


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_liger_is_no_less_exact_in_bfloat16(kind: str) -> None:
    reference = text_model(kind)
    plain = copy.deepcopy(reference).bfloat16()
    liger = with_liger(copy.deepcopy(plain))
    exact, expected, actual = (
        run(reference, torch.float64),
        run(plain, torch.bfloat16),
        run(liger, torch.bfloat16),
    )
    assert actual.keys() == expected.keys()
    errors = {n: (relative_error(actual[n], t), relative_error(expected[n], t)) for n, t in exact.items()}
    # Errors of single small tensors are random.
    for name, (of_liger, of_pytorch) in errors.items():
        assert of_liger <= 1.5 * of_pytorch + 1e-4, f"{name}: Liger {of_liger:.2e}, PyTorch {of_pytorch:.2e}"
    means = [sum(side) / len(side) for side in zip(*errors.values(), strict=True)]
    print(f"{kind}, two layers in bfloat16: mean error of Liger {means[0]:.2e}, of PyTorch {means[1]:.2e}")
    assert means[0] <= 1.1 * means[1] + 1e-4


def test_liger_is_equal_in_float32() -> None:
    plain = text_model("llama").float()
    liger = with_liger(copy.deepcopy(plain))
    expected, actual = run(plain, torch.float32), run(liger, torch.float32)
    for name, values in expected.items():
        assert relative_error(actual[name], values.double()) < 1e-5, name


def milliseconds(function: Callable[[], Any]) -> float:
    function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()  # type: ignore[no-untyped-call]
    for _ in range(10):
        function()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 10


def test_liger_is_faster_and_holds_less() -> None:
    plain = text_model("llama").bfloat16().requires_grad_(False)
    times, peaks = [], []
    for text in (plain, with_liger(copy.deepcopy(plain))):
        times.append(milliseconds(lambda text=text: run(text, torch.bfloat16)))
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(text, torch.bfloat16)
        peaks.append((torch.cuda.max_memory_allocated() - held) / 2**20)
    print(f"two frozen layers, {TOKENS} tokens: PyTorch {times[0]:.2f} ms, {peaks[0]:.0f} MiB; ", end="")
    print(f"Liger {times[1]:.2f} ms, {peaks[1]:.0f} MiB")
    assert times[1] < times[0] and peaks[1] < peaks[0]


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_policy_learns_the_same(tiny_llava_dir: Path, photo_root: Path, monkeypatch, mode: str) -> None:
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)  # the tiny products count as large
    encoder = encoder_of(tiny_llava_dir, photo_root)
    batch = packed_batch(encoder, three_groups())
    policies = []
    for checkpointing, lever in (("none", Lever("none", "")), (mode, LIGER)):
        options = ModelConfig(path=str(tiny_llava_dir), dtype="float32", gradient_checkpointing=checkpointing)
        config = Config(model=options, trainable=TrainableConfig(language="full"))

        def install(model: Any, config: Config = config, lever: Lever = lever) -> None:
            layer_kernels.install(model, encoder.family, config, lever)

        policies.append(trained(policy_of(config, encoder.family, install, CUDA), batch))
    expected, actual = policies
    torch.testing.assert_close(actual.logp_N, expected.logp_N, atol=1e-3, rtol=1e-3)
    for name, gradient in expected.gradients.items():
        assert relative_error(actual.gradients[name], gradient.double()) < 1e-2, name


def test_compiled_layers_may_call_liger(monkeypatch) -> None:
    """In one compilation for both layers, forward and backward."""
    monkeypatch.setitem(SIZES, "intermediate_size", 256)
    plain = text_model("llama").float()
    liger = with_liger(copy.deepcopy(plain))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    for layer in liger.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    expected, actual = run(plain, torch.float32), run(liger, torch.float32)
    for name, values in expected.items():
        assert relative_error(actual[name], values.double()) < 1e-5, name
    assert len(graphs) == 1


def test_the_same_answers_as_before(tiny_llava_dir: Path) -> None:
    pytest.importorskip("liger_kernel")
    model = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32"), CUDA)
    asked = {"input_ids": torch.arange(5, device=CUDA)[None] + 40, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**asked)
    layer_kernels.install(model, family_of(model.config), Config(), LIGER)
    assert torch.equal(model.generate(**asked), expected)


CONVOLUTIONS = {
    "Qwen2.5-VL, 4096 patches": ((3, 1280, (2, 14, 14)), (4096, 3, 2, 14, 14)),
    "Qwen3-VL, 4096 patches": ((3, 1152, (2, 16, 16)), (4096, 3, 2, 16, 16)),
    "CLIP-L, 16 images": ((3, 1024, (14, 14)), (16, 3, 336, 336)),
    "SigLIP, 16 images": ((3, 1152, (14, 14)), (16, 3, 384, 384)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_patch_embedding_is_no_less_exact(name: str) -> None:
    sizes, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    conv = getattr(torch.nn, f"Conv{len(sizes[2])}d")(*sizes, stride=sizes[2], device=CUDA, dtype=torch.bfloat16)
    pixels = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    few = pixels[: max(2, 64 * (len(shape) == 5))]
    exact = copy.deepcopy(conv).double()(few.double())
    tower = torch.nn.ModuleDict({"tower": torch.nn.ModuleDict({"proj": copy.deepcopy(conv)})})
    patch_embedding.install(tower, SimpleNamespace(vision_module="tower"), Config(), Lever("gemm", ""))  # type: ignore[arg-type]
    gemm = tower.get_submodule("tower.proj")
    assert relative_error(gemm(few), exact) <= 1.1 * relative_error(conv(few), exact) + 1e-4
    times = milliseconds(lambda: conv(pixels)), milliseconds(lambda: gemm(pixels))
    print(f"{name}: convolution {times[0]:.3f} ms, product {times[1]:.3f} ms, {times[0] / times[1]:.1f}x")
    if len(shape) == 5:  # what `auto` selects it for
        assert times[1] < times[0]
