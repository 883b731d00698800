"""Gradient checkpointing with inputs in host memory, here with copies within the CPU's memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.offload import HostInputs
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.tools.plan.live_bytes import LiveBytes
from tests.sample_groups import encoder_of, packed_batch, three_groups


@pytest.fixture
def copies_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostInputs, "devices", ("cuda", "cpu"))


@pytest.fixture(params=["llava", "qwen"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@pytest.mark.parametrize("language", ["full", "lora"])
def test_the_gradients_of_full_recomputation_to_the_bit(
    directory: Path, photo_root: Path, language: str, copies_on_a_cpu_too: None
) -> None:
    """Including dropout, of a trained vision tower too."""
    encoder = encoder_of(directory, photo_root)
    batch = packed_batch(encoder, three_groups())
    gradients = {}
    for mode in ("full", "offload"):
        options = ModelConfig(path=str(directory), dtype="float32", gradient_checkpointing=mode)  # type: ignore[arg-type]
        trainable = TrainableConfig(language=language, vision="full")  # type: ignore[arg-type]
        model = load_model(options, for_training=True)
        prepare_trainable(
            model, encoder.family, Config(model=options, trainable=trainable, lora=LoraConfig(r=2, dropout=0.4))
        )
        policy = PolicyModel(model).train()
        for seed in (3, 4):  # two micro-batches, both forward passes first, as of terms across groups
            torch.manual_seed(seed)
            with packed_layout(batch.layout):
                loss = policy(**model_inputs(batch.to(torch.device("cpu"), torch.float32))).sum()
                loss.backward()
        gradients[mode] = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert len(gradients["full"]) > 10 and gradients["offload"].keys() == gradients["full"].keys()
    assert [n for n, g in gradients["full"].items() if not torch.equal(g, gradients["offload"][n])] == []


def layers_of(count: int, size: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.Dropout(0.5)) for _ in range(count)]


def output_of(host: HostInputs, layers: list[torch.nn.Module], input_TD: torch.Tensor) -> torch.Tensor:
    for number, layer in enumerate(layers):
        input_TD = host.run(number, layer, input_TD)
    return input_TD


def gradients_of(layers: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [p.grad.clone() for layer in layers for p in layer.parameters() if p.grad is not None]


def test_backward_passes_in_any_order_and_twice(copies_on_a_cpu_too: None) -> None:
    layers, inputs = layers_of(4, 8), [torch.randn(5, 8), torch.randn(3, 8)]
    expected = []
    for host in (None, HostInputs()):
        torch.manual_seed(1)
        run = HostInputs() if host is None else host
        run.devices = () if host is None else ("cpu",)
        for layer in layers:
            layer.zero_grad()
        first, second = (output_of(run, layers, x) for x in inputs)
        first.sum().backward(retain_graph=True)
        second.sum().backward()
        first.sum().backward()
        expected.append(gradients_of(layers))
    assert all(torch.equal(a, b) for a, b in zip(*expected, strict=True))


def test_an_input_is_kept_on_the_device_only_while_its_layer_runs(copies_on_a_cpu_too: None) -> None:
    """And nothing is kept after the backward pass."""
    layers, host, originals = layers_of(6, 8), HostInputs(), []
    x = torch.randn(5, 8)
    for number, layer in enumerate(layers):
        x = x.clone()  # a storage of its own, as of a layer's sum
        originals.append(weakref.ref(x))
        x = host.run(number, layer, x)
    gc.collect()
    assert sum(ref() is not None for ref in originals) <= 1
    x.sum().backward()
    del x
    gc.collect()
    with LiveBytes([p for layer in layers for p in layer.parameters()]) as live:
        output_of(host, layers, torch.randn(5, 8)).sum().backward()
        for layer in layers:
            layer.zero_grad()
        gc.collect()
        assert live.now == 0


def test_on_a_cpu_nothing_is_copied() -> None:
    layers, x = layers_of(2, 8), torch.randn(5, 8)
    host = HostInputs()
    y = output_of(host, layers, x)
    assert host._latest is None
    y.sum().backward()
