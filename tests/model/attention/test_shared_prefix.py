"""Attention over packed groups against separate sequences.

Shape letters: B batch, H heads, T packed tokens, D head size.
"""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.data.collate import collate_groups
from bpo.model import load
from bpo.model.attention import shared_prefix as attention
from bpo.model.attention.choice import BackendName, Choice
from bpo.model.attention.shared_prefix import packed_layout, register, shared_prefix_attention
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import PackedLayout
from tests.attention_backends import (
    BACKENDS,
    LAYOUTS,
    each_sequence_alone,
    layout_of,
    num_compilations,
    num_tokens,
    random_qkv,
    run_without_gpu,
)
from tests.sample_groups import encode_all, encoder_of, three_groups


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_gpu(monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("key_heads", "scale"), [(4, None), (2, 0.3)], ids=["plain", "grouped-query"])
def test_values_and_gradients_equal_each_sequence_alone(
    layout: PackedLayout, key_heads: int, scale: float | None, backend: BackendName
) -> None:
    packed, alone = (random_qkv(num_tokens(layout), key_heads=key_heads) for _ in range(2))
    output = shared_prefix_attention(*packed, layout, scale, backend=backend)
    expected = each_sequence_alone(*alone, layout, scale)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    gradients = torch.autograd.grad((output * weight).sum(), packed)
    for name, ours, theirs in zip("qkv", gradients, torch.autograd.grad((expected * weight).sum(), alone), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_the_dtype_of_the_query(backend: BackendName) -> None:
    layout = LAYOUTS["three unequal groups"]
    length = num_tokens(layout)
    half = random_qkv(length, dtype=torch.bfloat16)
    output = shared_prefix_attention(*half, layout, backend=backend)
    assert output.dtype == torch.bfloat16 and output.shape == (1, length, 4, 8)
    expected = each_sequence_alone(*(one.double() for one in half), layout)
    torch.testing.assert_close(output.double(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_separate_prompts_needs_no_copies(backend: BackendName) -> None:
    layout = layout_of((3, (4,)), (5, ()), (2, (1,)))
    packed = random_qkv(num_tokens(layout))
    output = shared_prefix_attention(*packed, layout, backend=backend)
    torch.testing.assert_close(output, each_sequence_alone(*packed, layout), atol=1e-12, rtol=0)


def _interface(backend: BackendName, qkv: list[torch.Tensor], **options: Any) -> torch.Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    return attention._attention_interface(module, *qkv, None, backend=backend, **options)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_nest_and_are_gone_after_an_error(backend: BackendName) -> None:
    qkv = random_qkv(10)
    outer, inner = layout_of((3, (4, 3))), layout_of((5, (5,)))
    with packed_layout(outer):
        with pytest.raises(RuntimeError, match="inner"), packed_layout(inner):
            assert torch.equal(_interface(backend, qkv), shared_prefix_attention(*qkv, inner, backend=backend))
            raise RuntimeError("inner")
        assert torch.equal(_interface(backend, qkv), shared_prefix_attention(*qkv, outer, backend=backend))
    assert not attention._batches


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_are_made_once_a_batch_and_go_with_it(backend: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has a new layout in every batch: plans that are not freed would fill the memory."""
    made = []
    original = attention.BACKENDS[backend]

    def counted(layout: PackedLayout, device: torch.device) -> Any:
        plan = original.plan(layout, device)
        tensors = {"sdpa": lambda: plan[0].sees_CPC, "flex": lambda: plan.mask.kv_indices}
        made.append(weakref.ref(tensors.get(backend, lambda: plan.rows_R)()))
        return plan

    monkeypatch.setitem(attention.BACKENDS, backend, original._replace(plan=counted))
    layout = LAYOUTS["three unequal groups"]
    with packed_layout(layout), torch.no_grad():
        for _layer in range(3):
            _interface(backend, random_qkv(num_tokens(layout)))
        assert len(made) == 1 and made[0]() is not None
    torch._dynamo.reset()  # the compiler remembers the inputs of its last tracing
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("option", [{"sliding_window": 4}, {"softcap": 30.0}])
def test_what_attention_would_leave_out_is_refused(option: dict[str, Any]) -> None:
    with packed_layout(LAYOUTS["one completion"]), pytest.raises(ValueError, match="share_prefix=never"):
        _interface("sdpa", random_qkv(7), **option)


@pytest.mark.parametrize("backend", ["flash3", "varlen", "flex"])
def test_backends_without_dropout_refuse_it(backend: BackendName) -> None:
    with pytest.raises(ValueError, match="no dropout"):
        shared_prefix_attention(*random_qkv(7), LAYOUTS["one completion"], dropout=0.1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_choice_is_registered_and_logged_once(backend: BackendName, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    choice = Choice(backend, f"because of {backend}")
    register.cache_clear()
    with caplog.at_level(logging.INFO, logger="bpo.model.attention.shared_prefix"):
        name = register(choice)
        assert register(choice) == name == attention.BACKENDS[backend].registered_name
    assert [f"because of {backend}" in record.getMessage() for record in caplog.records] == [True]
    assert name in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert not any(part in name for part in ("flash", "flex", "sdpa"))  # transformers looks for these


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        *((backend, "selective") for backend in BACKENDS),
        *(("sdpa", "none"), ("sdpa", "full"), ("flash", "none"), ("varlen", "full"), ("flex", "full")),
    ],
)
def test_a_whole_model_equals_separate_sequences(
    backend: BackendName,
    checkpointing: str,
    tiny_llava_dir: Path,
    photo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    results = []
    for share in ("never", "auto"):
        choice = None if share == "never" else Choice(backend, "tested")
        monkeypatch.setattr(load, "choose_backend", lambda wanted, needs, choice=choice: choice)
        encoder = encoder_of(tiny_llava_dir, photo_root, share_prefix=share)
        config = ModelConfig(
            path=str(tiny_llava_dir), dtype="float32", share_prefix=share, gradient_checkpointing=checkpointing
        )
        policy = PolicyModel(load.load_model(config, for_training=True)).train()
        batch = collate_groups(encode_all(encoder, three_groups()), encoder.family)
        inputs = model_inputs(batch.to(torch.device("cpu"), torch.float32))
        with packed_layout(batch.layout):
            with torch.no_grad():
                reference_N = policy(**inputs)
            logp_N = policy(**inputs)
            logp_N.square().sum().backward()
        torch.testing.assert_close(logp_N.detach(), reference_N, atol=2e-5, rtol=0)
        gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        results.append((logp_N.detach(), gradients))
    (separate_N, expected), (packed_N, actual) = results
    torch.testing.assert_close(packed_N, separate_N, atol=2e-5, rtol=0)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual[name], gradient, atol=1e-4 * scale, rtol=0, msg=name)
    # One with a graph (training and recomputation), one without (the reference).
    assert num_compilations() == (2 if backend == "flex" else 0)
