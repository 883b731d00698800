"""Compiled decoder layers: equal results, few compilations."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import Encoder
from bpo.data.row_lengths import choose_lengths, pad_row
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers import compiled
from bpo.model.levers.choice import Lever
from bpo.model.load import load_base, resolve_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from tests.sample_groups import encode_all, encoder_of, group, packed_batch, three_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CPU = torch.device("cpu")
# With the backend `aot_eager`, the code is traced, differentiated and guarded as ever, but not compiled to C++.
TRACED = "aot_eager"


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=["llava", "qwen"])
def encoder(request: pytest.FixtureRequest, photo_root: Path) -> Encoder:
    return encoder_of(request.getfixturevalue(f"tiny_{request.param}_dir"), photo_root)


def directory_of(encoder: Encoder, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_llava_dir" if encoder.family.config.model_type == "llava" else "tiny_qwen_dir")


def config_of(directory: Path, dropout: float = 0.0, **options: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(directory), **{"dtype": "float32", **options}),
        trainable=TrainableConfig(language="lora"),
        lora=LoraConfig(r=2, alpha=64, dropout=dropout),
    )


def policy_of(config: Config, encoder: Encoder) -> PolicyModel:
    resolved = resolve_model(config.model, CPU, for_training=True)
    model = load_base(resolved)
    prepare_trainable(model, encoder.family, config)
    compiled.install(model, encoder.family, config, compiled.choose(config, resolved))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # otherwise the adapter is 0 and its dropout has no effect
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return PolicyModel(model).train()


def layers_of(policy: PolicyModel) -> compiled.CompiledLayers:
    (found,) = {type(m).compiled for m in policy.modules() if hasattr(type(m), "compiled")}
    return found


def logp_of(policy: PolicyModel, batch: GroupBatch) -> torch.Tensor:
    return policy(**model_inputs(batch.to(CPU, policy.model.dtype)))


def padded_batch(encoder: Encoder, length: int = 256) -> GroupBatch:
    return pad_row(packed_batch(encoder, three_groups()), (length,), encoder.family)


def trained(policy: PolicyModel, batch: GroupBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    policy.zero_grad()
    with packed_layout(batch.layout):
        logp_N = logp_of(policy, batch)
        (logp_N * torch.arange(1, len(logp_N) + 1)).sum().backward()
    return logp_N.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def worst_error(result: tuple[torch.Tensor, dict], truth: tuple[torch.Tensor, dict]) -> float:
    """Of log-probs and of each gradient, relative to its norm."""
    pairs = [(result[0], truth[0]), *((result[1][name].double(), truth[1][name].double()) for name in truth[1])]
    assert result[1].keys() == truth[1].keys()
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_padding_changes_no_value_and_no_gradient(encoder: Encoder, request: pytest.FixtureRequest) -> None:
    policy = policy_of(config_of(directory_of(encoder, request)), encoder)
    batch = packed_batch(encoder, three_groups())
    logp_N, gradients = trained(policy, batch)
    padded_logp_N, padded = trained(policy, padded_batch(encoder, 320))
    torch.testing.assert_close(padded_logp_N, logp_N, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_traced_layers_have_equal_gradients_and_dropout(
    encoder: Encoder, checkpointing: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit but for the order of sums; masks of dropout are drawn again when a layer is recomputed."""
    monkeypatch.setattr(compiled, "BACKEND", TRACED)
    directory, batch = directory_of(encoder, request), padded_batch(encoder)
    options = {"gradient_checkpointing": checkpointing}
    expected = trained(policy_of(config_of(directory, 0.4, **options), encoder), batch)
    policy = policy_of(config_of(directory, 0.4, compile="layers", **options), encoder)
    for _ in range(2):
        assert worst_error(trained(policy, batch), expected) < 1e-5
    assert layers_of(policy).num_graphs > 0


def test_no_compilation_after_each_length_was_seen(
    encoder: Encoder, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """200 random packings with dropout, in training and in evaluation; all layers share what is compiled."""
    monkeypatch.setattr(compiled, "BACKEND", TRACED)
    caplog.set_level(logging.INFO)
    config = config_of(directory_of(encoder, request), 0.4, compile="layers", compile_buckets=2)
    policy, draw = policy_of(config, encoder), random.Random(0)
    layers, pool = layers_of(policy), encode_all(encoder, [*three_groups(), group("d", "a", "b" * 70)])
    packed = [collate_groups(draw.choices(pool, k=draw.randint(1, 4)), encoder.family) for _ in range(200)]
    lengths = choose_lengths([batch.input_ids_T.numel() for batch in packed], number=2)
    assert len(lengths) == 2
    counts, seen = {}, set()
    for batch in (pad_row(batch, lengths, encoder.family) for batch in packed):
        for training in (True, False):
            policy.train(training)
            with packed_layout(batch.layout), torch.set_grad_enabled(training):
                logp_of(policy, batch)
        seen.add(batch.input_ids_T.numel())
        assert counts.setdefault(len(seen), layers.num_graphs) == layers.num_graphs
    assert seen == set(lengths) and counts[2] == 2 * counts[1]
    logged = [record.getMessage() for record in caplog.records if "compiled layers" in record.getMessage()]
    assert f"rows of {lengths[0]} tokens, " in logged[0] or f"rows of {lengths[1]} tokens, " in logged[0]
    assert f"rows of {lengths[0]}, {lengths[1]} tokens, {layers.num_graphs} graphs in" in logged[-1]


def test_too_many_lengths_are_an_error(tiny_llava_dir: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would run them uncompiled and say so in a warning."""
    monkeypatch.setattr(compiled, "BACKEND", TRACED)
    monkeypatch.setattr(compiled, "_VARIANTS", 1)
    encoder = encoder_of(tiny_llava_dir, photo_root)
    policy = policy_of(config_of(tiny_llava_dir, compile="layers", compile_buckets=1), encoder)
    with pytest.raises(Exception, match="recompile_limit"):
        for length in (256, 320, 384):
            trained(policy, padded_batch(encoder, length))


def test_compiled_code_rounds_as_the_plain_path(tiny_llava_dir: Path, photo_root: Path) -> None:
    """Compiled to C++, in bf16, in training and evaluation; generation and FLOP counters run the layers uncompiled."""
    encoder = encoder_of(tiny_llava_dir, photo_root)
    batch, config = padded_batch(encoder), config_of(tiny_llava_dir, dtype="bfloat16")
    truth = trained(policy_of(config_of(tiny_llava_dir), encoder).double(), batch)
    plain = policy_of(config, encoder)
    policy = policy_of(config_of(tiny_llava_dir, dtype="bfloat16", compile="layers"), encoder)
    assert list(policy.state_dict()) == list(plain.state_dict())
    result = trained(policy, batch)
    assert worst_error(result, truth) < 1.1 * worst_error(trained(plain, batch), truth) + 1e-3
    with torch.no_grad(), packed_layout(batch.layout):
        assert float((logp_of(policy.eval(), batch) - result[0]).abs().max()) < 1e-3
    graphs = layers_of(policy).num_graphs
    assert graphs > 0
    ids = torch.tensor([[5, 6, 7]])
    words = [one.eval().model.generate(ids, max_new_tokens=4, do_sample=False) for one in (policy, plain)]
    assert torch.equal(*words)
    counters = []
    for one in (policy, plain):
        with FlopCounterMode(display=False) as counter, packed_layout(batch.layout), torch.no_grad():
            logp_of(one, batch)
        counters.append(counter.get_total_flops())
    assert counters[0] == counters[1] and layers_of(policy).num_graphs == graphs


def chosen(directory: Path, **options: Any) -> Lever:
    config = config_of(directory, **options)
    return compiled.choose(config, resolve_model(config.model, CPU, for_training=True))


def test_what_is_selected_and_what_is_refused(tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(tiny_llava_dir).value == chosen(tiny_llava_dir, compile="none").value == "none"
    assert chosen(tiny_llava_dir, compile="layers").value == "layers"
    with pytest.raises(ValueError, match="share_prefix to auto, or set model.compile to none"):
        chosen(tiny_llava_dir, compile="layers", share_prefix="never")
    with pytest.raises(ValueError, match="selective, .*: set it to full, offload or none, or set model.compile"):
        chosen(tiny_llava_dir, compile="layers", gradient_checkpointing="selective")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler .no-such-compiler.: install g"):
        chosen(tiny_llava_dir, compile="layers")
