"""Gradient checkpointing with inputs in pinned host memory, on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.offload import HostInputs
from bpo.model.policy import PolicyModel, model_inputs
from tests.sample_groups import encoder_of, packed_batch, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA


class Block(torch.nn.Module):
    """As deterministic as its products, unlike attention, whose backward pass adds atomically; with dropout."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(torch.nn.functional.silu(self.up(x_TD)), 0.1)
        return x_TD + self.down(hidden)


def step(
    blocks: list[Block], x_TD: torch.Tensor, devices: tuple[str, ...], micro_batches: int
) -> tuple[list[torch.Tensor], int]:
    """Gradients, and peak bytes in addition to what was allocated before."""
    host = HostInputs()
    host.devices = devices
    for block in blocks:
        block.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(3)
    for _ in range(micro_batches):
        y_TD = x_TD.clone()
        for number, block in enumerate(blocks):
            y_TD = host.run(number, block, y_TD)
        y_TD.square().mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [p.grad.clone() for block in blocks for p in block.parameters() if p.grad is not None], peak


def test_the_gradients_of_full_recomputation_in_less_memory() -> None:
    """To the bit, in every one of several micro-batches, so that no copy is read or overwritten too early."""
    width, rows, count = 1024, 8192, 16
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    blocks = [Block(width).to(device, torch.bfloat16) for _ in range(count)]
    x_TD = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    step(blocks, x_TD, (), 1)  # cuBLAS allocates its workspace
    expected, full = step(blocks, x_TD, (), 3)
    given, offloaded = step(blocks, x_TD, ("cuda",), 3)
    assert len(given) == 4 * count and all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))
    of_an_input = rows * width * 2
    assert full - offloaded > (count - 4) * of_an_input


def test_a_graph_that_is_dropped_leaves_nothing_on_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    blocks, host = [Block(64).to(device) for _ in range(4)], HostInputs()
    before = torch.cuda.memory_allocated()
    y_TD = torch.randn(256, 64, device=device)
    for number, block in enumerate(blocks):
        y_TD = host.run(number, block, y_TD)
    del y_TD
    assert torch.cuda.memory_allocated() - before <= 256 * 64 * 4  # the input that is copied last


def test_a_model_with_attention_in_bfloat16(tiny_llava_dir: Path, photo_root: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch = packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())
    gradients = {}
    for mode in ("full", "offload"):
        config = ModelConfig(path=str(tiny_llava_dir), dtype="bfloat16", gradient_checkpointing=mode)  # type: ignore[arg-type]
        policy = PolicyModel(load_model(config, for_training=True).to(device)).train()
        with packed_layout(batch.layout):
            policy(**model_inputs(batch.to(device, torch.bfloat16))).sum().backward()
        gradients[mode] = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    for name, expected in gradients["full"].items():
        bound = 2e-2 * float(expected.abs().max())  # attention's backward pass adds atomically
        torch.testing.assert_close(gradients["offload"][name], expected, atol=bound, rtol=0, msg=name)
