"""`bpo bench step --levers` on a real GPU: rates, kernels and memory of rows, one after another in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.tools.bench.step import main

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA


def test_rows_of_a_small_model(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = "--levers --model llava-1.5-7b-8th --image-tokens 16 --prompt-tokens 24 --answer-tokens 16 --completions 2"
    words += " --num-groups 4 --repetitions 2 --gradient-checkpointing none --rows lora.kernel=addmm auto"
    assert main([*words.split(), "--json", str(path)]) == 0, path.read_text()
    report = json.loads(path.read_text())
    assert [(row["name"], row["status"]) for row in report["rows"]] == [
        (name, "ok") for name in ("plain", "lora.kernel=addmm", "auto")
    ]
    plain, addmm, auto = report["rows"]
    assert report["case"]["dtype"] == "bfloat16" and plain["levers"]["lora.kernel"] == "peft"
    # PEFT launches dropout, A, B, scale and sum for each of a layer's seven linear layers.
    assert addmm["launches"] < plain["launches"] and plain["launches"] > 500
    weights = 2 * 14e6  # bf16 parameters of the shape
    for row in (plain, addmm, auto):
        assert row["seconds"][0] > 0 and weights < row["peak_bytes"] < 20 * weights and row["flops"] > 1e9
    assert plain["bytes"] > 0 and addmm["bytes"] > 0
