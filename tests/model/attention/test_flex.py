"""FlexAttention over packed rows: block masks and compilations.

Shape letters: T packed tokens, Q blocks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

from bpo.model.attention.flex import BLOCK, flex_plan
from bpo.model.attention.shared_prefix import shared_prefix_attention
from bpo.records import PackedLayout
from tests.attention_backends import (
    LAYOUTS,
    each_sequence_alone,
    layout_of,
    num_compilations,
    num_tokens,
    random_qkv,
    run_without_gpu,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
ROWS = {
    **LAYOUTS,
    "edges on blocks": layout_of((BLOCK, (BLOCK, BLOCK)), (2 * BLOCK, (64, 64))),
    "one pair in the last block": layout_of((BLOCK - 1, (1, 1))),
    "one block": layout_of((BLOCK - 3, (3,))),
    "many blocks": layout_of((400, (100, 37, 5)), (631, (90, 120)), (31, (7,)), (300, ())),
}


def visible_pairs(layout: PackedLayout) -> torch.Tensor:
    """[T, T]: whether a query attends to a key, computed per pair from the definition."""
    sees = torch.zeros(num_tokens(layout), num_tokens(layout), dtype=torch.bool)
    for prefix, completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        for span in (prefix, *completions):
            for row in range(*span):
                sees[row, [*range(prefix[0], min(prefix[1], row + 1)), *range(span[0], row + 1)]] = True
    return sees


def as_sets(num_blocks: torch.Tensor, indices: torch.Tensor) -> list[set[int]]:
    """The listed columns of each row of blocks."""
    counts = num_blocks[0, 0].tolist()
    return [set(indices[0, 0, row, :count].tolist()) for row, count in enumerate(counts) if count]


@pytest.mark.parametrize("layout", ROWS.values(), ids=ROWS)
def test_block_mask_equals_that_of_all_pairs(layout: PackedLayout) -> None:
    plan, sees, length = flex_plan(layout, CPU).mask, visible_pairs(layout), num_tokens(layout)
    rows = torch.arange(length)
    assert torch.equal(plan.mask_mod(0, 0, rows[:, None], rows[None, :]), sees)
    expected = create_block_mask(lambda b, h, q, k: sees[q, k], None, None, length, length, device="cpu")
    assert plan.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        ours, theirs = (
            as_sets(getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")) for mask in (plan, expected)
        )
        assert ours == theirs, kind


def test_blocks_between_groups_are_left_out() -> None:
    plan = flex_plan(ROWS["many blocks"], CPU).mask
    computed = int(plan.kv_num_blocks.sum() + plan.full_kv_num_blocks.sum())
    assert computed < 0.4 * plan.kv_indices.shape[-1] ** 2
    assert int(plan.full_kv_num_blocks.sum()) > 0.3 * computed  # without a mask to evaluate


def test_one_compilation_serves_rows_of_all_shapes_with_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_gpu(monkeypatch)
    torch._dynamo.reset()
    assert len({num_tokens(layout) for layout in ROWS.values()}) >= 7
    for with_graph in (False, True):
        for layout in ROWS.values():
            qkv = random_qkv(num_tokens(layout), key_heads=2)
            with torch.set_grad_enabled(with_graph):
                output = shared_prefix_attention(*qkv, layout, backend="flex")
            if with_graph:
                output.sum().backward()
    assert num_compilations() == 2


def test_stays_compiled_under_a_dispatch_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_gpu(monkeypatch)
    torch._dynamo.reset()
    layout = ROWS["one block"]
    with FlopCounterMode(display=False):
        shared_prefix_attention(*random_qkv(num_tokens(layout)), layout, backend="flex")
    assert num_compilations() == 1


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_for_real_one_kernel_serves_rows_of_all_shapes() -> None:
    """The forward pass only: FlexAttention has no compiled backward pass on CPU."""
    torch._dynamo.reset()
    for layout in ROWS.values():
        qkv = [x.detach() for x in random_qkv(num_tokens(layout), key_heads=2, dtype=torch.float32, head_size=16)]
        output = shared_prefix_attention(*qkv, layout, backend="flex")
        torch.testing.assert_close(output, each_sequence_alone(*qkv, layout), atol=2e-6, rtol=0)
    assert num_compilations() == 1


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Inductor lowers to Triton, which is not installed"
)
def test_both_passes_lower_and_compile_for_a_gpu_with_sizes_as_symbols(tmp_path: Path) -> None:
    """Inductor's Triton kernels for an H100 and grouped heads, compiled to cubins; they are not launched."""
    command = [sys.executable, "tests/flex_lowering.py", "28", "4", "--compile"]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {report["pass"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert set(kernels) == {"forward", "backward"}
    for report in kernels.values():
        assert report["cubin_bytes"] > 0 and 0 < report["shared_bytes"] <= 227 << 10
        assert not report["length_is_a_constant"]
