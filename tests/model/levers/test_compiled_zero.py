"""Compiled layers under ZeRO, on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.test_train import ROOT, launch, write_groups
from tests.tiny import tiny_llava

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CASES = ("llava:2:300:none", "llava:3:300:full", "lora:3:peft:none")


def test_gradients_are_those_of_plain_layers(tmp_path: Path) -> None:
    """All parameters, or an adapter behind a frozen projector; under ZeRO-3 each is partitioned, however small."""
    write_groups(tmp_path, 8)
    tiny_llava(tmp_path / "llava")
    job = "tests/model/levers/compiled_job.py"
    result = launch([sys.executable, job, str(tmp_path), *CASES], PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert result.returncode == 0, result.stdout[-6000:]
    assert result.stdout.count("compiled layers: rows of") >= len(CASES)
    for case in CASES:
        plain, compiled = torch.load(tmp_path / f"{case}.pt", weights_only=True).values()
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        for name, gradient in plain["gradients"].items():
            if gradient is None or "k_proj.bias" in name:  # softmax ignores a constant added to every key
                continue
            bound = 5e-6 * float(gradient.abs().max()) + 1e-9
            torch.testing.assert_close(compiled["gradients"][name], gradient, atol=bound, rtol=0, msg=f"{case} {name}")
