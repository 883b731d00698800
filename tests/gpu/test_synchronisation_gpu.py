"""Where a step waits for a real GPU, as CUDA's synchronisation debug mode reports it. `-s` prints all places."""

from __future__ import annotations

import collections
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.loss import LossConfig
from bpo.data.transfer import on_device
from bpo.training.step import run_step
from tests.device_reads import callers, in_own_code
from tests.step_engine import open_step

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA


@contextmanager
def synchronisations() -> Iterator[list[list[str]]]:
    """Collects the functions that wait for the GPU, innermost first, as `DeviceReads.found`."""
    found: list[list[str]] = []

    def show(message: Any, *rest: Any) -> None:
        if "synchroniz" in str(message):
            found.append(["synchronisation", *callers(traceback.extract_stack())])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_step_waits_for_the_gpu_once(
    name: str, family_dir: Callable[[str], Path], photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    loss = LossConfig(chosen_nll_weight=0.1)
    engine, batches, config = open_step(family_dir(name), photo_root, loss, "cuda", "bfloat16")
    run_step(engine, list(on_device(batches, engine.device, torch.bfloat16)), config, 4, step=0)  # compiles kernels
    with synchronisations() as found:
        sums = run_step(engine, list(on_device(batches, engine.device, torch.bfloat16)), config, 4, step=1)
    with synchronisations() as of_reading:
        engine.read_step(sums.on_device(), torch.ones((), device=engine.device))
    print(name, *collections.Counter(" < ".join(places[1:4]) for places in found).items(), sep="\n")
    assert in_own_code(found) == []
    assert len(in_own_code(of_reading)) == 1 and len(of_reading) == 1
