"""Layers of `lora.kernel` against PEFT's own: same numbers, gradients, files; dropout that is drawn again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch.utils._python_dispatch import TorchDispatchMode

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model import recompute
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers import lora
from bpo.model.levers.choice import Lever
from bpo.model.levers.lora import adapter_dropout, choose
from bpo.model.levers.lora_layers import GroupedLinear
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from bpo.training.checks import seed_micro_batch
from bpo.training.flops import model_flops
from bpo_kernels.philox import keep_mask
from tests.sample_groups import encoder_of, packed_batch, three_groups

CPU = torch.device("cpu")
# Relative to the largest entry of a tensor, for another order of fp32 sums; 4e-7 was measured.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["llava", "qwen"])
def directory(request: pytest.FixtureRequest, tiny_llava_dir: Path, tiny_qwen_dir: Path) -> Path:
    return tiny_llava_dir if request.param == "llava" else tiny_qwen_dir


@pytest.fixture(scope="module")
def batch(directory: Path, photo_root: Path) -> GroupBatch:
    return packed_batch(encoder_of(directory, photo_root), three_groups())


def adapted(directory: Path, kernel: str, mode: str = "none", **options: Any) -> Any:
    """A prepared model with an adapter that is not zero."""
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32", gradient_checkpointing=mode),  # type: ignore[arg-type]
        trainable=TrainableConfig(projector="frozen"),
        lora=LoraConfig(r=3, alpha=6, kernel=kernel, **{"dropout": 0.0, **options}),  # type: ignore[arg-type]
    )
    model = load_model(config.model, for_training=True)
    family = family_of(model.config)
    prepare_trainable(model, family, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    lora.install(model, family, config, Lever(kernel, ""))
    return model.train()


def run(model: Any, batch: GroupBatch, seed: int | None = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs and gradients of a weighted sum of them."""
    policy = PolicyModel(model)
    policy.zero_grad()
    with packed_layout(batch.layout), adapter_dropout(seed or 0, CPU):
        logp_N = policy(**model_inputs(batch.to(CPU, torch.float32)))
        (logp_N * torch.arange(1, len(logp_N) + 1)).sum().backward()
    return logp_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_like(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 10
    for name, value in expected.items():
        bound = TOLERANCE * float(value.abs().max())
        torch.testing.assert_close(actual[name], value, atol=bound, rtol=0, msg=name)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("kernel", ["fused", "addmm"])
def test_log_probs_and_gradients_are_those_of_peft(directory, batch, monkeypatch, kernel: str, mode: str) -> None:
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)
    expected_N, expected = run(adapted(directory, "peft"), batch)
    logp_N, gradients = run(adapted(directory, kernel, mode), batch)
    torch.testing.assert_close(logp_N, expected_N, atol=1e-5, rtol=1e-5)
    assert_like(gradients, expected)


@pytest.mark.parametrize("options", [{"variant": "rslora"}, {"target": ["v_proj", "up_proj", "down_proj"]}], ids=str)
def test_other_scales_and_some_of_the_layers(directory, batch, options: dict[str, Any]) -> None:
    expected_N, expected = run(adapted(directory, "peft", **options), batch)
    logp_N, gradients = run(adapted(directory, "addmm", **options), batch)
    torch.testing.assert_close(logp_N, expected_N, atol=1e-5, rtol=1e-5)
    assert_like(gradients, expected)


class MaskedDropout(torch.nn.Module):
    """Dropout by the documented mask, for PEFT's layers."""

    def __init__(self, probability: float, key: torch.Tensor):
        super().__init__()
        self.probability, self.key = probability, key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        keep_TD = keep_mask(*rows.shape, self.probability, lora.dropout_seed() + self.key, 0)
        return x * keep_TD.view(x.shape) / (1 - self.probability)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_dropout_is_autograd_with_masks_that_checkpointing_repeats(directory, batch, monkeypatch, mode: str) -> None:
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)
    grouped = adapted(directory, "addmm", mode, dropout=0.4)
    plain = adapted(directory, "peft", dropout=0.4)
    for name, module in grouped.named_modules():
        if isinstance(module, GroupedLinear):
            plain.get_submodule(name).lora_dropout["default"] = MaskedDropout(0.4, module.dropout_key)
    expected_N, expected = run(plain, batch)
    logp_N, gradients = run(grouped, batch)
    torch.testing.assert_close(logp_N, expected_N, atol=1e-5, rtol=1e-5)
    assert_like(gradients, expected)
    if mode != "none":
        without_N, without = run(adapted(directory, "addmm", dropout=0.4), batch)
        assert torch.equal(logp_N, without_N)
        assert all(torch.equal(gradients[name], value) for name, value in without.items())


def test_masks_differ_by_seed_and_layer_and_are_absent_in_eval_mode(directory, batch) -> None:
    model = adapted(directory, "addmm", dropout=0.4)
    first, again, other = (run(model, batch, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    keys = {int(module.dropout_key) for module in model.modules() if isinstance(module, GroupedLinear)}
    assert len(keys) == 4 * 2  # qkv, o, gate and up, down of two layers
    expected_N, _ = run(adapted(directory, "addmm"), batch)
    torch.testing.assert_close(run(model.eval(), batch)[0], expected_N, atol=0, rtol=0)


def test_training_without_a_seed_is_refused(tiny_llava_dir: Path) -> None:
    model = adapted(tiny_llava_dir, "addmm", dropout=0.4)
    with pytest.raises(RuntimeError, match=r"enclose forward and backward in adapter_dropout"):
        model(input_ids=torch.arange(5)[None])
    model.eval()(input_ids=torch.arange(5)[None])


def test_seeds_of_micro_batches_steps_and_ranks_differ() -> None:
    positions = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    seeds = [seed_micro_batch(*position) for position in positions]
    assert len(set(seeds)) == len(seeds) and seeds[0] == seed_micro_batch(*positions[0]) and max(seeds) < 2**63


def is_adapted_attention(module: Any) -> bool:
    return hasattr(getattr(module, "q_proj", None), "lora_A")


def attention_of(model: Any) -> Any:
    return next(filter(is_adapted_attention, model.modules()))


@pytest.mark.parametrize("calls", ["q k v", "v k q", "k", "q q k k v v", "q k* v", "q k- v"])
@pytest.mark.parametrize("grad", [True, False])
def test_layers_may_be_called_in_any_order_and_with_other_tensors(tiny_llava_dir: Path, calls: str, grad: bool) -> None:
    """`*` is called with another tensor, `-` after the tensor was changed in place."""
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for kernel in ("peft", "addmm"):
        attention, tensor = attention_of(adapted(tiny_llava_dir, kernel)), x_TD.clone()
        outputs = []
        with torch.set_grad_enabled(grad):
            for call in calls.split():
                if call.endswith("-"):
                    tensor.mul_(2)
                outputs.append(getattr(attention, f"{call[0]}_proj")(2 * tensor if "*" in call else tensor))
        assert all(output.requires_grad == grad for output in outputs)
        if grad and "-" not in calls:
            sum(output.square().sum() for output in outputs).backward()
        # A layer that was computed but not called has a gradient of 0, with PEFT none.
        gradients = [torch.zeros(()) if p.grad is None or not p.grad.any() else p.grad for p in attention.parameters()]
        results.append([*outputs, *gradients])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_outputs_computed_without_gradient_are_not_handed_to_a_call_with_it(tiny_llava_dir: Path) -> None:
    attention, x_TD = attention_of(adapted(tiny_llava_dir, "addmm")), torch.randn(5, 32)
    with torch.no_grad():
        attention.q_proj(x_TD)
    assert attention.k_proj(x_TD).requires_grad


class CountCalls(TorchDispatchMode):
    """Executed operations; results that checkpointing replays are not executed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "forward"), [("none", 8), ("full", 16), ("selective", 8)])
def test_one_operation_computes_the_layers_of_one_input(directory, batch, monkeypatch, mode: str, forward: int) -> None:
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)
    model = adapted(directory, "addmm", mode)
    with CountCalls() as counter:
        run(model, batch)
    assert counter.calls["bpo::lora_forward"] == forward
    assert counter.calls["bpo::lora_backward"] == 8


def test_all_layers_of_one_kind_share_a_compilation(tiny_llava_dir: Path) -> None:
    """A number or hook that differs between them would have each compiled again."""
    model = adapted(tiny_llava_dir, "addmm", dropout=0.4)
    attentions = [module for module in model.modules() if is_adapted_attention(module)]
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    graphs = []

    def project(attention: Any, x_TD: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x_TD) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(project, backend=backend, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        for attention in attentions:
            with adapter_dropout(seed, CPU):
                torch.testing.assert_close(compiled(attention, x_TD), project(attention, x_TD), atol=0, rtol=0)
    assert len(attentions) == 2 and len(graphs) == 1


def test_nothing_of_a_micro_batch_is_kept(tiny_llava_dir: Path, monkeypatch) -> None:
    """Not even where k and v were never asked for."""
    model = adapted(tiny_llava_dir, "addmm")
    attention = attention_of(model)
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (attention.q_proj(hidden_states), None))
    seen = []
    attention.q_proj.register_forward_hook(lambda _, inputs, output: seen.append(weakref.ref(inputs[0])))
    model(input_ids=torch.arange(5)[None])
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    assert not attention.q_proj.group.waiting


def test_generation_and_other_models_are_unchanged(tiny_llava_dir: Path) -> None:
    answers = []
    for kernel in ("peft", "addmm"):
        model = adapted(tiny_llava_dir, kernel, dropout=0.4).eval()
        tokens = torch.arange(5, 12)[None].repeat(2, 1)
        answers.append(model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=True))
    assert torch.equal(*answers)
    assert type(attention_of(adapted(tiny_llava_dir, "peft")).q_proj) is PeftLinear


def test_state_copies_and_parameter_names_are_those_of_peft(directory) -> None:
    plain, grouped = adapted(directory, "peft"), adapted(directory, "addmm")
    states = [model.state_dict() for model in (plain, grouped, copy.deepcopy(grouped))]
    assert list(states[0]) == list(states[1]) == list(states[2])
    assert all(torch.equal(state[name], states[0][name]) for state in states[1:] for name in state)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in grouped.named_modules()]
    assert model_flops(plain, family_of(plain.config)) == model_flops(grouped, family_of(grouped.config))


@pytest.mark.parametrize("case", ["disabled", "merged", "two", "bias", "dora", "mixed", "autocast"])
def test_what_the_operation_does_not_compute_is_left_to_peft(tiny_llava_dir: Path, case: str) -> None:
    results = []
    for kernel in ("peft", "addmm"):
        model = adapted(tiny_llava_dir, kernel)
        attention, x_TD = attention_of(model), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        layer, context = attention.q_proj, torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
        if case == "disabled":
            layer.enable_adapters(False)
        elif case == "merged":
            layer.merge()
        elif case in ("two", "bias", "dora"):
            settings = peft.LoraConfig(r=2, use_dora=case == "dora", lora_bias=case == "bias", init_lora_weights=False)
            torch.manual_seed(0)
            layer.update_layer("second", 2, 4, settings)
            layer.set_adapter(["default", "second"] if case == "two" else ["second"])
        elif case == "mixed":
            layer.lora_A["default"].double(), layer.lora_B["default"].double()
        with context:
            results.append([getattr(attention, name)(x_TD) for name in ("q_proj", "k_proj", "v_proj")])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "cpu", "peft"),
        ({}, "cuda", "peft"),
        ({"lora": LoraConfig(kernel="addmm", variant="rslora")}, "cuda", "addmm"),
        ({"lora": LoraConfig(variant="dora")}, "cuda", "peft"),
        ({"lora": LoraConfig(r=512)}, "cuda", "peft"),
        ({"model": ModelConfig(quantization="nf4")}, "cuda", "peft"),
        ({"trainable": TrainableConfig(language="full")}, "cuda", "peft"),
        ({"lora": LoraConfig(kernel="fused")}, "cpu", "fused"),
        ({"lora": LoraConfig(kernel="peft")}, "cuda", "peft"),
        ({"lora": LoraConfig(kernel="fused", variant="dora")}, "cpu", "variant is dora.*set lora.variant to lora"),
        ({"lora": LoraConfig(kernel="addmm", r=512)}, "cuda", "lora.r is 512: set it to at most 256"),
        (
            {"lora": LoraConfig(kernel="addmm"), "model": ModelConfig(quantization="nf4")},
            "cuda",
            "quantization is nf4: set it to none, or lora.kernel to auto",
        ),
    ],
)
def test_what_auto_selects_and_what_is_refused(options: dict[str, Any], device: str, expected: str) -> None:
    resolved: Any = SimpleNamespace(device=torch.device(device))
    if " " not in expected:
        assert choose(Config(**options), resolved).value == expected
        return
    with pytest.raises(ValueError, match=expected):
        choose(Config(**options), resolved)
