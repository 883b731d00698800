"""Attention over packed groups on a real GPU: every backend that can run there against separate sequences.

Shape letters: T packed tokens, K key heads, D head size.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bpo.config.training import ModelConfig
from bpo.model import load
from bpo.model.attention.choice import BackendName, Choice, Needs, obstacle
from bpo.model.attention.flash import attend_flash_2, attend_flash_3, attend_torch_varlen
from bpo.model.attention.flops import register_flop_formulas, sequence_pairs
from bpo.model.attention.shared_prefix import packed_layout, shared_prefix_attention
from bpo.model.attention.varlen import VarlenPlan, _GatherRows, varlen_plan
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import PackedLayout
from tests.attention_backends import VARLEN, each_sequence_alone, layout_of, num_compilations, num_tokens, random_qkv
from tests.sample_groups import encoder_of, packed_batch, three_groups
from tests.varlen_reference import flash_attn_3_varlen_func, flash_attn_varlen_func

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

CUDA = torch.device("cuda")
ROWS = {
    "groups of 2 and 3": layout_of((620, (90, 140)), (655, (60, 210, 120)), (612, (35, 48, 1))),
    "a stand-in image": layout_of((640, (100, 100)), (600, ())),
    "one-token completions": layout_of((130, (1, 1, 1)), (127, (1, 2))),
}
# Query heads, key heads, head size.
SHAPES = {"llava-1.5-7b": (32, 32, 128), "qwen2.5-vl-7b": (28, 4, 128)}


KERNELS = {"flash3": attend_flash_3, "flash": attend_flash_2, "varlen": attend_torch_varlen}


def needed(backend: BackendName, dtype: torch.dtype = torch.bfloat16) -> BackendName:
    why_not = obstacle(backend, Needs(CUDA, dtype, 128))
    if why_not is not None:
        pytest.skip(f"{backend}: {why_not}")
    return backend


@pytest.mark.parametrize("backend", VARLEN)
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (7, 1)])
def test_grouped_heads_and_masks_aligned_bottom_right(backend: BackendName, heads: int, key_heads: int) -> None:
    """The kernels only: values and gradients for as many queries as keys, fewer, and one."""
    needed(backend)
    lengths = [(5, 5), (20, 150), (1, 90), (1, 1), (130, 300)]
    starts = [
        torch.tensor([0, *torch.tensor(lengths)[:, side].cumsum(0).tolist()], dtype=torch.int32, device=CUDA)
        for side in (0, 1)
    ]
    unused = torch.empty(0, dtype=torch.int32, device=CUDA)
    plan = VarlenPlan(*starts, max(q for q, _ in lengths), max(k for _, k in lengths), unused, unused, unused)
    options = {"key_heads": key_heads, "head_size": 64, "dtype": torch.bfloat16, "device": "cuda"}
    query = random_qkv(int(starts[0][-1]), heads, **options)[0]
    inputs = [query, *random_qkv(int(starts[1][-1]), heads, **options)[1:]]
    output = KERNELS[backend](*(x[0].transpose(0, 1) for x in inputs), plan, 0.2, 0.0)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    pieces = []
    of_queries, of_keys = ([pair[side] for pair in lengths] for side in (0, 1))
    split = (exact[0].split(of_queries, 2), exact[1].split(of_keys, 2), exact[2].split(of_keys, 2))
    for q, k, v in zip(*split, strict=True):
        k, v = (x.repeat_interleave(heads // key_heads, 1) for x in (k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=CUDA).tril(k.shape[2] - q.shape[2])
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2))
    expected = torch.cat(pieces, 2)[0].transpose(0, 1)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(CUDA)
    ours = [output.detach(), *torch.autograd.grad(output, inputs, weight.bfloat16())]
    theirs = [expected.detach(), *torch.autograd.grad(expected, exact, weight.bfloat16().float())]
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert float((a.float() - b).abs().max()) <= 2e-2 * float(b.abs().max()), name


@pytest.mark.parametrize("backend", [*VARLEN, "flex"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flops_are_counted_by_formula(backend: BackendName, key_heads: int) -> None:
    layout = ROWS["groups of 2 and 3"]
    needed(backend)
    qkv = random_qkv(num_tokens(layout), 4, key_heads, torch.bfloat16, "cuda", 64)
    shared_prefix_attention(*qkv, layout, backend=backend).sum().backward()  # compiles
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        shared_prefix_attention(*qkv, layout, backend=backend).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * sequence_pairs(layout) * 4 * 64


@pytest.mark.parametrize("backend", [*VARLEN, "flex", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ROWS.values(), ids=ROWS)
def test_values_and_gradients_equal_separate_sequences(
    layout: PackedLayout, shape: tuple[int, int, int], backend: BackendName
) -> None:
    """No further from fp32 than separate sequences in bf16, except for one more rounding."""
    heads, key_heads, size = shape
    options = {"heads": heads, "key_heads": key_heads, "head_size": size, "device": "cuda"}
    packed, alone = (random_qkv(num_tokens(layout), dtype=torch.bfloat16, **options) for _ in range(2))
    exact = [x.detach().float().requires_grad_() for x in packed]
    results = []
    weight = torch.randn(1, num_tokens(layout), heads, size, generator=torch.Generator().manual_seed(1)).to(CUDA)
    for qkv, output in (
        (packed, shared_prefix_attention(*packed, layout, backend=needed(backend))),
        (alone, each_sequence_alone(*alone, layout)),
        (exact, each_sequence_alone(*exact, layout)),
    ):
        gradients = torch.autograd.grad(output, qkv, weight.to(output.dtype))
        results.append([output.detach().float(), *(x.float() for x in gradients)])
    for name, ours, separate, true in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        allowed = 2 * float((separate - true).abs().max()) + 1e-2 * float(true.abs().max())
        assert float((ours - true).abs().max()) <= allowed, name


@pytest.mark.parametrize("with_graph", [False, True])
def test_flex_compiles_once_for_rows_of_all_shapes(with_graph: bool) -> None:
    needed("flex")
    torch._dynamo.reset()
    rows = [layout_of((100 + 37 * n, (20 + n, 31)), (64 * n, (n,) * n)) for n in range(1, 9)]
    for layout in rows:
        qkv = random_qkv(num_tokens(layout), key_heads=2, head_size=64, dtype=torch.bfloat16, device="cuda")
        with torch.set_grad_enabled(with_graph):
            output = shared_prefix_attention(*qkv, layout, backend="flex")
        if with_graph:
            output.sum().backward()
    assert num_compilations() == 1


@pytest.mark.parametrize(
    ("module", "stand_in"), [("flash_attn", flash_attn_varlen_func), ("flash_attn_interface", flash_attn_3_varlen_func)]
)
def test_flash_attn_has_the_recorded_signature(module: str, stand_in: Callable) -> None:
    theirs = inspect.signature(pytest.importorskip(module).flash_attn_varlen_func).parameters
    assert list(theirs) == list(inspect.signature(stand_in).parameters)


def test_gradients_of_copies_are_rounded_once_and_the_same_every_time() -> None:
    layout = layout_of((300, (2, 3, 4, 1)), (70, ()), (111, (5, 2)))
    plan = varlen_plan(layout, CUDA)
    source = random_qkv(num_tokens(layout), dtype=torch.bfloat16, device="cuda")[0][0].transpose(0, 1)
    gathered = _GatherRows.apply(source, plan)
    gradient = torch.randn(gathered.shape, device=CUDA).bfloat16()
    results = [torch.autograd.grad(gathered, source, gradient, retain_graph=True)[0] for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)
    exact = torch.zeros(source.shape, device=CUDA, dtype=torch.float64)
    exact.index_add_(0, plan.rows_R.long(), gradient.double())
    # One rounding to bf16, of a sum of up to four that is exact to fp32.
    torch.testing.assert_close(results[0].double(), exact, atol=1e-6, rtol=2**-8)


def test_plans_wait_for_nothing() -> None:
    """A synchronisation while making a plan would idle the GPU once per batch."""
    layout = ROWS["groups of 2 and 3"]
    qkv = random_qkv(num_tokens(layout), head_size=64, dtype=torch.bfloat16, device="cuda")
    every: tuple[BackendName, ...] = (*VARLEN, "flex", "sdpa")
    backends = [name for name in every if obstacle(name, Needs(CUDA, torch.bfloat16, 64)) is None]
    for backend in backends:
        shared_prefix_attention(*qkv, layout, backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in backends:
            shared_prefix_attention(*qkv, layout, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def wide_heads(tiny_llava_dir: Path, tmp_path: Path) -> Path:
    """The tiny LLaVA with heads of 16 elements, FlexAttention's least: the same weights in half as many heads."""
    directory = tmp_path / "llava"
    shutil.copytree(tiny_llava_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("backend", [*VARLEN, "flex"])
def test_a_whole_model_agrees_with_sdpa(
    backend: BackendName, checkpointing: str, wide_heads: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and the gradient's norm in bf16, through two layers."""
    needed(backend)
    batch = packed_batch(encoder_of(wide_heads, photo_root), three_groups())
    results = []
    for name in (backend, "sdpa"):
        monkeypatch.setattr(load, "choose_backend", lambda wanted, needs, name=name: Choice(name, "tested"))
        config = ModelConfig(path=str(wide_heads), dtype="bfloat16", gradient_checkpointing=checkpointing)
        policy = PolicyModel(load.load_model(config, CUDA, for_training=True)).to(CUDA)
        with packed_layout(batch.layout):
            logp_N = policy(**model_inputs(batch.to(CUDA, torch.bfloat16)))
            logp_N.sum().backward()
        norm = torch.stack([p.grad.float().norm() for p in policy.parameters() if p.grad is not None]).norm()
        results.append((logp_N.detach(), norm))
    torch.testing.assert_close(results[0][0], results[1][0], atol=0.2, rtol=0.05)
    torch.testing.assert_close(results[0][1], results[1][1], atol=0, rtol=0.05)
