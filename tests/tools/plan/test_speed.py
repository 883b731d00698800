"""Computed step times."""

from __future__ import annotations

import functools

import pytest

from bpo.config.training import Config, TrainableConfig
from bpo.records import UsefulWork
from bpo.tools.plan.memory import Zero
from bpo.tools.plan.shape import ModelShape, shape_of
from bpo.tools.plan.speed import Machine, communicated_bytes, recomputed_flops, step_time
from bpo.training.hardware import ACCELERATORS, accelerator

WORK = UsefulWork(tokens=8000, responses=2000, image_tokens=4000, pairs=4_000_000, patches=16000, patch_pairs=10**7)


@functools.cache
def shape(language: str = "full") -> ModelShape:
    return shape_of("qwen2-vl-2b", Config(trainable=TrainableConfig(language=language)))


def test_volumes_are_those_of_the_zero_paper() -> None:
    """arXiv 1910.02054, section 7, times (N - 1) / N; frozen weights are gathered and have no gradient."""
    whole, trained = 2 * shape("lora").num_parameters, 2 * shape("lora").num_trained
    sent = {stage: communicated_bytes(shape("lora"), Zero(stage), 4, 3, 2) * 4 / 3 for stage in range(4)}
    assert sent == pytest.approx(
        {0: 2 * trained, 1: 2 * trained, 2: 4 * trained, 3: 3 * (2 * whole + trained)}, rel=1e-12
    )
    assert communicated_bytes(shape(), Zero(3), 1, 3, 2) == 0


def test_time_is_flops_by_peak_and_bytes_by_links() -> None:
    alone = step_time(shape(), Zero(2), Machine(accelerator("h100"), gpus_per_node=1), WORK, 1, "none")
    assert alone.total == alone.compute == pytest.approx(shape().flops.step(WORK) / (0.4 * 989.4e12))
    assert alone.mfu == pytest.approx(0.4)
    again = step_time(shape(), Zero(2), Machine(accelerator("h100"), gpus_per_node=1), WORK, 1, "full")
    assert again.useful == alone.useful and again.mfu < 0.4
    assert again.compute / alone.compute == pytest.approx(
        1 + recomputed_flops(shape(), WORK, "full") / shape().flops.step(WORK)
    )
    assert recomputed_flops(shape(), WORK, "selective") == 0


def test_communication_hides_behind_computation_and_no_further() -> None:
    slow = Machine(accelerator("h100"), nodes=4, node_gb_s=0.1)
    time = step_time(shape(), Zero(3), slow, WORK, 1, "none")
    assert time.communication > 10 * time.compute
    assert time.total == pytest.approx(time.communication)
    fast = Machine(accelerator("h100"), nodes=4, node_gb_s=400)
    assert step_time(shape(), Zero(3), fast, WORK, 1, "none").total < time.total


def test_offload_costs_transfers_and_the_cpus_adam() -> None:
    machine = Machine(accelerator("a100-80gb"))
    none, some, both = (
        step_time(shape(), zero, machine, WORK, 1, "none")
        for zero in (Zero(3), Zero(3, offload_optimizer=True), Zero(3, offload_optimizer=True, offload_param=True))
    )
    assert none.offload == 0 < some.offload < both.offload
    assert some.total - none.total == pytest.approx(some.offload)


def test_copies_of_weights_per_node_leave_gradients_and_the_update_to_the_network() -> None:
    """arXiv 2306.10209, section 3.2, for 3 micro-batches on 2 nodes of 8: both passes gather within a node."""
    whole, trained = 2 * shape("lora").num_parameters, 2 * shape("lora").num_trained
    hpz = Zero(3, group_ranks=8)
    sent = communicated_bytes(shape("lora"), hpz, 16, 3, 2)
    assert sent == pytest.approx((6 * whole - trained) * 7 / 8 + 4 * trained * 15 / 16, rel=1e-12)
    gpu = accelerator("h100")
    times = [step_time(shape("lora"), zero, Machine(gpu, nodes=2), WORK, 3, "none") for zero in (Zero(3), hpz)]
    within, across = (6 * whole - trained) * 7 / 8, 4 * trained * 15 / 16
    assert times[1].communication == pytest.approx(within / 450e9 + across / 50e9)
    assert times[1].communication < times[0].communication / 5


def test_inputs_in_host_memory_cost_what_computation_does_not_hide() -> None:
    machine = Machine(accelerator("h100"), gpus_per_node=1)
    full, offload = (step_time(shape(), Zero(2), machine, WORK, 1, mode) for mode in ("full", "offload"))
    assert offload.compute == full.compute and offload.offload == 0
    fast = Machine(accelerator("h100"), gpus_per_node=1, utilisation=1e3)
    moved = 2 * 28 * 1536 * 2 * WORK.tokens / (fast.gpu.host_gb_s * 1e9)
    again = step_time(shape(), Zero(2), fast, WORK, 1, "offload")
    assert again.offload == pytest.approx(moved - again.compute)


def test_weights_on_a_disk_are_read_once_per_pass_by_all_ranks_of_a_node() -> None:
    machine = Machine(accelerator("h100"), nvme_gb_s=4.0)
    host, disk = (
        step_time(shape("lora"), Zero(3, True, True, param_on_nvme=on_disk), machine, WORK, 3, "none")
        for on_disk in (False, True)
    )
    read = (6 * 2 * shape("lora").num_parameters + 2 * shape("lora").num_trained) / 4e9
    assert disk.offload - host.offload == pytest.approx(read)


def test_every_gpu_is_named_once_and_has_sane_figures() -> None:
    assert len({one.name for one in ACCELERATORS}) == len(ACCELERATORS)
    for one in ACCELERATORS:
        assert 100 < one.peak_tflops < 3000 and 20 <= one.memory_gb <= 200
        assert one.host_gb_s <= one.link_gb_s < one.memory_gb_s
    with pytest.raises(ValueError, match="--gpu v100: unknown; available: a100-40gb"):
        accelerator("v100")
