"""The benchmark: its FLOP formula, its memory figure, its refusal on red.    pytest tests/kernels/test_bench.py"""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bpo_kernels import bench

CPU = torch.device("cpu")


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (16, 4096))
    monkeypatch.setattr(bench, "MIN_SECONDS", 0.0)


def test_flops_formula_is_what_eager_pytorch_does(tiny_shape):
    for case in bench._head_cases("linear_logprob", "tiny", 64, torch.float32, CPU):
        with FlopCounterMode(display=False) as counter:
            case.providers["eager"]()
        assert counter.get_total_flops() == case.flops, case.variant


def test_peak_memory_of_a_frozen_head_is_one_chunk_of_logits(tiny_shape):
    frozen, _ = bench._head_cases("linear_logprob", "tiny", 64, torch.float32, CPU)
    logits_bytes = 64 * 4096 * 4
    ours = bench.peak_extra_bytes(frozen.providers["bpo"], CPU)
    eager = bench.peak_extra_bytes(frozen.providers["eager"], CPU)
    assert logits_bytes <= ours < 1.1 * logits_bytes
    assert eager > 1.9 * logits_bytes


def test_red_tests_report_nothing(monkeypatch, tmp_path, capsys):
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "tests" / "kernels" / "test_preference_loss.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    report = tmp_path / "report.json"
    assert bench.main(["preference_loss", "--json", str(report)]) == 1
    output = capsys.readouterr()
    assert " ms " not in output.out and not report.exists()
    assert "the tests of preference_loss fail: nothing is reported" in output.err


def test_json_says_where_the_figures_come_from(monkeypatch, tmp_path, tiny_shape):
    monkeypatch.setattr(bench, "tests_pass", lambda operation, device: True)
    report = tmp_path / "results" / "report.json"
    assert bench.main(["preference_loss", "--rows", "512", "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    assert {"device", "torch", "commit", "implementation", "dtype"} <= content.keys()
    assert {result["provider"] for result in content["results"]} == {"bpo", "eager"}
    assert all(result["median_ms"] > 0 for result in content["results"])


def test_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["logprob"])
    assert "unknown operation 'logprob': use linear_logprob" in capsys.readouterr().err
