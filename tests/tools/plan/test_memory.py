"""Bytes of a rank.

Shape letters: N response tokens, H hidden size.
"""

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
from transformers import AutoModelForImageTextToText

from bpo.config.loss import LossConfig
from bpo.config.training import Config, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.engine import find_ds_config, with_fitting_buckets
from bpo.job.launch import Ranks
from bpo.losses.program import HeadOutput, LossProgram
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch, HeadRequest, LossInputs, SecondTargets
from bpo.tools.plan.activations import ActivationCosts, activation_costs
from bpo.tools.plan.live_bytes import LiveBytes
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


def memory(language: str, ds_config: str, world_size: int, nodes: int = 1, **options: Any) -> RankMemory:
    shape, costs = sized(language)
    settings = json.loads(find_ds_config(f"ds_configs/{ds_config}.json").read_text())
    zero = Zero.from_settings(with_fitting_buckets(settings, shape.num_trained), nodes, world_size // nodes)
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


def test_a_second_copy_of_the_weights_is_divided_over_a_node() -> None:
    whole = 2 * sized("lora")[0].num_parameters
    one, two = (memory("lora", "zero3_hpz", 8 * nodes, nodes=nodes).parts["weights"] for nodes in (1, 2))
    assert one == pytest.approx(whole / 8) and two == pytest.approx(whole / 16 + whole / 8)


def test_weights_on_a_disk_leave_buffers_in_host_memory() -> None:
    host, disk = (memory("lora", name, 1) for name in ("zero3_offload", "zero3_nvme"))
    assert host.host - disk.host == pytest.approx(2 * sized("lora")[0].num_parameters - 2 * 5e8)
    assert disk.peak == host.peak


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


def checked_model(directory: Path, language: str) -> tuple[ModelShape, PolicyModel, GroupBatch]:
    """The small LLaVA of benchmarks/memory_check.py in fp32, and its micro-batch of six groups."""
    from transformers import AutoConfig

    from benchmarks.memory_check import MODELS, Case, make_batch

    AutoModelForImageTextToText.from_config(AutoConfig.for_model(**MODELS["llava"])).save_pretrained(directory)
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        trainable=TrainableConfig(language=language),  # type: ignore[arg-type]
    )
    model = load_model(config.model, for_training=True)
    family = family_of(model.config)
    prepare_trainable(model, family, config)
    return shape_of(str(directory), config), PolicyModel(model.train()), make_batch(Case("small"), family)


def test_a_waiting_micro_batch_keeps_its_activations_and_what_its_head_saved(tmp_path: Path) -> None:
    """Terms across groups: each further forward pass before the first backward pass adds as much as is predicted."""
    shape, policy, batch = checked_model(tmp_path, "full")
    program = LossProgram(LossConfig(type="rpo_diagonal"))
    batch = batch.with_reference(torch.zeros(len(batch.target_N)))
    live, outputs, after = LiveBytes([*policy.parameters(), *policy.buffers(), *batch.tensors()], device="cpu"), [], []
    with live, packed_layout(batch.layout):
        for _ in range(3):
            request = program.request(batch.loss_inputs)
            head = policy(**model_inputs(batch), loss_inputs=batch.loss_inputs, request=request)
            outputs.append(program.apply(HeadOutput(*head), batch.loss_inputs))
            after.append(live.now)
    work = batch.useful_work
    load = Load(work.tokens, work.responses, work.image_tokens, work.patches)
    costs = activation_costs(shape, "none", device="cpu")
    zero = Zero(stage=2)
    alone, waiting = (
        rank_memory(shape, costs, zero, load, 1, torch.float32, "cpu", waiting=count).phases for count in (0, 2)
    )
    pixels = 3 * 14 * 14 * 4 * work.patches  # of each micro-batch; here all have the same tensors
    measured = after[2] - after[0]
    assert waiting["backward"] - alone["backward"] - 2 * pixels == pytest.approx(measured, rel=0.05)
    assert after[2] - after[1] == pytest.approx(after[1] - after[0], rel=0.01)
    assert waiting["step"] == alone["step"]
    assert len(outputs) == 3


@pytest.mark.parametrize("language", ["lora", "full"])
def test_second_targets_add_rows_of_hidden_states_and_of_the_weight(language: str, tmp_path: Path) -> None:
    shape, policy, _ = checked_model(tmp_path, language)
    head, hidden, vocab = policy.model.lm_head, shape.text.hidden_size, shape.text.vocab_size
    hidden_NH, target_N = torch.randn(600, hidden, requires_grad=True), torch.arange(600) % vocab
    peaks: dict[int, tuple[float, float]] = {}
    for count in (0, 400):
        inputs = LossInputs(
            completion_of_token_N=torch.zeros(600 + count, dtype=torch.long),
            completion_starts_K1=torch.tensor([0, 600 + count]),
            pairs_P2=torch.zeros(0, 2, dtype=torch.long),
            pair_weight_P=torch.zeros(0),
            pair_beta_P=torch.zeros(0),
            pairs_of_term=(0,),
            second=SecondTargets(torch.arange(count), torch.arange(count)) if count else None,
        )
        live = LiveBytes([hidden_NH, *policy.parameters(), target_N], device="cpu")
        with live:
            _, logp_N, _, _ = head(hidden_NH, target_N, inputs, HeadRequest())
            forward = live.peak
            live.reset_peak()
            learn = [hidden_NH, head.weight] if language == "full" else [hidden_NH]
            gradients = torch.autograd.grad(logp_N.sum(), learn)
        peaks[count] = (forward, live.peak)
        del gradients, logp_N
    predicted = {count: head_bytes(shape, 600, torch.float32, "cpu", count) for count in peaks}
    for count, of_count in predicted.items():
        forward, backward = peaks[count]
        assert of_count.forward - of_count.rows == pytest.approx(forward, rel=0.05), count
        assert of_count.kept + of_count.backward - of_count.rows == pytest.approx(backward, rel=0.05), count
    more = (
        head_bytes(shape, 600, torch.bfloat16, "cuda", 400).kept - head_bytes(shape, 600, torch.bfloat16, "cuda").kept
    )
    assert more == 400 * hidden * 2
