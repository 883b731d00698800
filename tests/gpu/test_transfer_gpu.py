"""Copies that overlap the computation, on a real GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpo.data.transfer import on_device
from tests.sample_groups import encoder_of, packed_batch, three_groups

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA


def test_batches_arrive_whole_while_the_gpu_is_busy(tiny_llava_dir: Path, photo_root: Path) -> None:
    """A long kernel is queued before each batch is read, so that a copy that does not wait is detected."""
    device = torch.device("cuda", torch.cuda.current_device())
    batch = packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())
    pixels = batch.image_inputs["pixel_values"].repeat(64, 1, 1, 1)
    sent = [replace(batch, image_inputs={"pixel_values": pixels + k}) for k in range(8)]
    square = torch.randn(4096, 4096, device=device)
    received = []
    for moved in on_device(iter(sent), device, torch.bfloat16):
        for _ in range(20):
            square = torch.nn.functional.normalize(square @ square)
        received.append((moved.image_inputs["pixel_values"] + 0.0, moved.input_ids_T + 0))
    assert len(received) == len(sent)
    for host_batch, (values, ids) in zip(sent, received, strict=True):
        assert torch.equal(values.cpu(), host_batch.image_inputs["pixel_values"].to(torch.bfloat16))
        assert torch.equal(ids.cpu(), host_batch.input_ids_T)
