"""Bytes of a rank."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config, TrainableConfig
from bpo.engine import find_ds_config, with_fitting_buckets
from bpo.job.launch import Ranks
from bpo.tools.plan.activations import ActivationCosts, activation_costs
from bpo.tools.plan.memory import CUDA_CONTEXT_BYTES, FRAGMENTATION, Load, RankMemory, Zero, head_bytes, rank_memory
from bpo.tools.plan.shape import ModelShape, shape_of

ROOT = Path(__file__).resolve().parents[3]
LOAD = Load(tokens=4096, responses=1200, image_tokens=2048, patches=8192)
# A part of benchmarks/memory_check.py: both families and precisions, every stage, adapters, a trained tower.
CHECKED = ("llava-lora-selective", "llava-full-bf16-zero1", "qwen-full-vision-zero3")


@functools.cache
def sized(language: str, name: str = "qwen2-vl-2b") -> tuple[ModelShape, ActivationCosts]:
    shape = shape_of(name, Config(trainable=TrainableConfig(language=language)))
    return shape, activation_costs(shape, "full")


def memory(language: str, ds_config: str, world_size: int, **options: Any) -> RankMemory:
    shape, costs = sized(language)
    settings = json.loads(find_ds_config(f"ds_configs/{ds_config}.json").read_text())
    zero = Zero.from_settings(with_fitting_buckets(settings, shape.num_trained))
    return rank_memory(shape, costs, zero, LOAD, world_size, torch.bfloat16, **options)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_within_a_tenth_of_every_live_byte(tmp_path: Path) -> None:
    """Trains small models with DeepSpeed on one CPU rank and counts; see benchmarks/memory_check.py."""
    report = tmp_path / "memory.json"
    command = [sys.executable, "benchmarks/memory_check.py", "--json", str(report), "--only", *CHECKED]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert report.exists(), result.stderr[-3000:]
    outcomes = json.loads(report.read_text())["outcomes"]
    assert [outcome["case"]["name"] for outcome in outcomes] == list(CHECKED)
    assert {outcome["case"]["name"]: outcome["error"] for outcome in outcomes if abs(outcome["error"]) > 0.1} == {}
    assert result.returncode == 0


@pytest.mark.parametrize("on_gpu", [True, False])
def test_first_case_on_a_gpu_is_run_once_before_it_is_measured(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuBLAS allocates once, and keeps, is not taken for a part of the first case's peak."""
    from benchmarks import memory_check

    compared: list[str] = []
    monkeypatch.setattr(memory_check.torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(memory_check.collectives, "barrier", lambda: None)
    monkeypatch.setattr(memory_check, "compare", lambda case, *others: compared.append(case.name) or case.name)
    outcomes = memory_check.run(list(CHECKED), Ranks(rank=1, world_size=2), Path("unused"))
    chosen = [case.name for case in memory_check.CASES if case.name in CHECKED]
    assert outcomes == chosen
    assert compared == ([chosen[0]] if on_gpu else []) + chosen


@pytest.mark.parametrize("name", ["memory-cpu.json", "memory-cpu-2-ranks.json"])
def test_the_document_shows_the_committed_reports(name: str) -> None:
    from benchmarks.memory_check import TOLERANCE, table

    report = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    assert max(abs(outcome["error"]) for outcome in report["outcomes"]) < TOLERANCE
    document = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    assert report["machine"]["commit"] in document and table(report) in document


@pytest.mark.parametrize("language", ["lora", "full"])
def test_states_are_those_of_the_zero_paper_in_bf16(language: str) -> None:
    """2 bytes of weights, 12 of fp32 master and moments: divided as arXiv 1910.02054 says, by 8 ranks."""
    shape, _ = sized(language)
    whole, trained = shape.num_parameters, shape.num_trained
    for name in ("zero1", "zero2"):
        parts = memory(language, name, 8).parts
        assert parts["weights"] == 2 * whole  # frozen ones too, on every rank
        assert parts["optimizer"] == 12 * trained / 8
    assert memory(language, "zero3", 8).parts["weights"] == 2 * whole / 8


def test_offload_moves_states_to_the_host() -> None:
    shape, _ = sized("full")
    here, there = memory("full", "zero2", 8), memory("full", "zero2_offload", 8)
    assert there.parts["optimizer"] == 0 < here.parts["optimizer"]
    assert there.peak < here.peak and here.host == 0
    assert there.host > 16 * shape.num_trained / 8
    both = memory("full", "zero3_offload", 8)
    assert both.host - there.host == pytest.approx(2 * shape.num_parameters / 8)
    assert both.peak < memory("full", "zero3", 8).peak


def test_whole_gradients_live_on_under_zero1_alone() -> None:
    shape, _ = sized("full")
    one, two = (memory("full", name, 8).parts["gradients"] for name in ("zero1", "zero2"))
    part = 2 * shape.num_trained / 8
    assert (one, two) == (2 * shape.num_trained + part, part)
    assert memory("full", "zero1", 8, accumulates=False).parts["gradients"] == part


def test_more_ranks_and_fewer_tokens_never_need_more() -> None:
    for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        peaks = [memory("full", name, world).peak for world in (2, 8, 64, 1024)]
        assert peaks == sorted(peaks, reverse=True), name


def test_a_gpu_has_a_context_and_fragments() -> None:
    on_gpu = memory("lora", "zero2", 8)
    assert on_gpu.parts["overhead"] == pytest.approx(CUDA_CONTEXT_BYTES + FRAGMENTATION * max(on_gpu.phases.values()))
    assert on_gpu.peak == pytest.approx(sum(on_gpu.parts.values()))
    assert memory("lora", "zero2", 8, device="cpu").parts["overhead"] == 0


def test_a_frozen_head_keeps_two_rows_of_hidden_states_and_a_trained_one_the_vocabulary() -> None:
    for language in ("lora", "full"):
        shape, _ = sized(language)
        hidden, vocab = shape.text.hidden_size, shape.text.vocab_size
        head = head_bytes(shape, 1000, torch.bfloat16, "cuda")
        assert head.kept == (2 * 1000 * hidden * 2 if language == "lora" else 1000 * hidden * 2 + 1000 * vocab * 2)
        assert head.forward - head.kept <= 2 << 30


def test_a_file_of_ones_own_is_read() -> None:
    zero = Zero.from_settings(
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7, "offload_param": {"device": "cpu"}}}
    )
    assert (zero.stage, zero.reduce_bucket, zero.offload_param, zero.offload_optimizer) == (3, 50_000_000, True, False)
    assert zero.overlap_comm  # DeepSpeed's default of stage 3
