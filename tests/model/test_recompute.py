"""Recomputation in the backward pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.encode import Encoder
from bpo.model import recompute
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.recompute import checkpoint_layers, is_costly, selective_contexts
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from bpo.tools.plan.live_bytes import LiveBytes
from tests.sample_groups import encoder_of, packed_batch, three_groups

CPU = torch.device("cpu")
FULL = TrainableConfig(language="full", vision="full")
LORA = TrainableConfig(language="lora")


@pytest.fixture(autouse=True)
def tiny_layers_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are 32 wide, and the adapter's rank is 2."""
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)


@pytest.fixture(scope="module", params=["llava", "qwen"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@pytest.fixture(scope="module")
def encoder(directory: Path, photo_root: Path) -> Encoder:
    return encoder_of(directory, photo_root)


@pytest.fixture(scope="module")
def batch(encoder: Encoder) -> GroupBatch:
    return packed_batch(encoder, three_groups())


def policy_of(directory: Path, encoder: Encoder, mode: Any, trainable: TrainableConfig) -> PolicyModel:
    options = ModelConfig(path=str(directory), dtype="float32", gradient_checkpointing=mode)
    config = Config(model=options, trainable=trainable, lora=LoraConfig(r=2, alpha=64, dropout=0.4))
    model = load_model(options, for_training=True)
    prepare_trainable(model, encoder.family, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # otherwise the adapter is 0 and its dropout has no effect
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return PolicyModel(model).train()


def forward(policy: PolicyModel, batch: GroupBatch) -> torch.Tensor:
    torch.manual_seed(3)
    logp_N = policy(**model_inputs(batch.to(CPU, torch.float32)))
    return (logp_N * torch.arange(1, len(logp_N) + 1)).sum()


def trained(policy: PolicyModel, batch: GroupBatch) -> tuple[float, dict[str, torch.Tensor]]:
    with packed_layout(batch.layout):
        loss = forward(policy, batch)
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trainable", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_the_same_loss_and_gradients_to_the_bit(directory, encoder, batch, mode: str, trainable) -> None:
    """Including LoRA's dropout, whose masks are drawn again."""
    expected_loss, expected = trained(policy_of(directory, encoder, "none", trainable), batch)
    loss, gradients = trained(policy_of(directory, encoder, mode, trainable), batch)
    assert loss == expected_loss and gradients.keys() == expected.keys() and len(expected) > 10
    assert [name for name in expected if not torch.equal(gradients[name], expected[name])] == []


class CountOperators(TorchDispatchMode):
    """Executed operations; a replayed result is not executed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls["costly" if is_costly(func, args) else func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainable", [FULL, LORA], ids=["full", "lora"])
def test_selective_repeats_no_product_and_no_attention(directory, encoder, batch, trainable) -> None:
    calls = {}
    for mode in ("none", "full", "selective"):
        policy = policy_of(directory, encoder, mode, trainable)
        with CountOperators() as counter:
            trained(policy, batch)
        calls[mode] = counter.calls
    assert calls["selective"]["costly"] == calls["none"]["costly"] < calls["full"]["costly"]
    cheap = "aten::silu"  # the language model's activation
    assert calls["selective"][cheap] == calls["full"][cheap] > calls["none"][cheap] > 0


@pytest.mark.parametrize(("rank", "kept"), [(128, False), (129, True)])
def test_a_product_over_a_small_rank_is_not_worth_keeping(monkeypatch, rank: int, kept: bool) -> None:
    monkeypatch.undo()
    low_TR, up_RD = torch.ones(3, rank), torch.ones(rank, 4)
    assert is_costly(torch.ops.aten.mm.default, (low_TR, up_RD)) == kept
    assert is_costly(torch.ops.aten.addmm.default, (torch.ones(4), low_TR, up_RD)) == kept
    assert is_costly(torch.ops.aten.mm.default, (up_RD.T, low_TR.T)) == kept
    assert not is_costly(torch.ops.aten.mul.Tensor, (low_TR, low_TR))
    assert not is_costly(torch.ops.aten.mm.out, (low_TR, up_RD))


def test_each_mode_holds_less_than_the_one_before(directory, encoder, batch) -> None:
    held = []
    for mode in ("none", "selective", "full"):
        policy = policy_of(directory, encoder, mode, FULL)
        with packed_layout(batch.layout), LiveBytes(policy.parameters()) as live:
            loss = forward(policy, batch)
            held.append(live.now)
            loss.backward()
    assert held[1] < 0.75 * held[0] and held[2] < 0.75 * held[1]


def test_true_and_false_are_still_accepted() -> None:
    spelled = {value: ModelConfig(gradient_checkpointing=value).gradient_checkpointing for value in (True, False)}
    assert spelled == {True: "full", False: "none"}
    assert ModelConfig().gradient_checkpointing == "none"


def test_selective_refuses_attention_dropout(tiny_llava_dir: Path) -> None:
    model = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32"), for_training=True)
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1: model\.gradient_checkpointing=selective"):
        checkpoint_layers(model, "selective")
    checkpoint_layers(model, "full")


def test_a_model_without_layers_to_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no layers that support checkpointing"):
        checkpoint_layers(torch.nn.Linear(2, 2), "full")


def test_a_kept_result_may_be_overwritten() -> None:
    """As in DeepSpeed's ZeRO-3 linear layers, with their bias: it would be added twice."""
    weight = torch.randn(4, 4, requires_grad=True)
    inputs = torch.randn(3, 4)

    def layer(x_TD: torch.Tensor) -> torch.Tensor:
        product_TD = x_TD @ weight
        product_TD += 1.0
        return torch.sigmoid(product_TD) @ weight

    (expected,) = torch.autograd.grad(layer(inputs).sum(), weight)
    run = checkpoint(layer, inputs, use_reentrant=False, context_fn=selective_contexts)
    (gradient,) = torch.autograd.grad(run.sum(), weight)
    assert torch.equal(gradient, expected)


def test_a_second_backward_computes_what_the_first_used_up() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    run = checkpoint(
        lambda x: (x @ weight).sigmoid() @ weight, torch.randn(3, 4), use_reentrant=False, context_fn=selective_contexts
    )
    (once,) = torch.autograd.grad(run.sum(), weight, retain_graph=True)
    (again,) = torch.autograd.grad(run.sum(), weight)
    assert torch.equal(once, again) and once.abs().max() > 0
