"""Layer kernels and patch embeddings as products on two ranks, under ZeRO-3 and without partitioned parameters.

ZeRO-3 gathers a module's weights only while it runs, and again for its backward pass.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.test_train import launch, write_groups
from tests.tiny import tiny_qwen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

CASES = ("levers:qwen:3:300:full", "levers:qwen:3:300:selective")
# Relative to a gradient's largest entry, for other fp32 sums.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("levers")
    write_groups(root, 4)
    tiny_qwen(root / "qwen")
    cases = ["plain:qwen:2:300", *CASES]
    result = launch([sys.executable, "tests/layer_lever_matrix.py", str(root), *cases])
    assert result.returncode == 0, result.stdout[-6000:]
    return {case: torch.load(root / f"{case}.pt", weights_only=True) for case in cases}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_layers(results: dict[str, Any], case: str) -> None:
    plain = results["plain:qwen:2:300"]
    assert results[case]["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    expected = {name: value for name, value in plain["gradients"].items() if value is not None}
    assert "model.visual.patch_embed.proj.weight" in expected
    for name, value in expected.items():
        bound = TOLERANCE * float(value.abs().max())
        torch.testing.assert_close(results[case]["gradients"][name], value, atol=bound, rtol=0, msg=name)
