"""The parts of the engine that need no process group."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bpo.checkpoint.partition import check_settings
from bpo.config.training import TrainConfig
from bpo.engine import (
    _CONFIG_OWNED,
    deepspeed_config,
    find_ds_config,
    init_distributed,
    learning_rate_factor,
    with_fitting_buckets,
)
from bpo.job.launch import Ranks


def factors(steps: int, warmup: float, schedule: str) -> list[float]:
    config = TrainConfig(warmup_ratio=warmup, lr_schedule=schedule)
    return [learning_rate_factor(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_schedule_warms_up_peaks_once_and_never_gives_0(steps: int, warmup: float, schedule: str) -> None:
    values = factors(steps, warmup, schedule)
    peak = values.index(max(values))
    assert all(0 < value <= 1 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    assert peak <= -(-warmup * steps // 1) and (max(values) == 1 or steps == 1)


def test_a_small_dev_shm_is_enough_under_the_deepspeed_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed crashes in its 64 MB of shared memory per rank if LOCAL_SIZE tells it that all are on one host."""
    import deepspeed

    seen: list[str | None] = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: seen.append(os.environ.get("LOCAL_SIZE")))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **options: None)
    for name, value in {"LOCAL_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the code sets is undone afterwards
        if not os.environ[name]:
            monkeypatch.delenv(name)
    init_distributed(Ranks())
    assert seen == [None] and os.environ["LOCAL_SIZE"] == "1"


def test_schedule_values() -> None:
    assert factors(4, 0.0, "cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert factors(4, 0.0, "linear") == [1, 0.75, 0.5, 0.25]
    assert factors(4, 0.5, "constant") == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = find_ds_config("ds_configs/zero3.json")
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == 3
    with pytest.raises(ValueError, match="zero9.json: no such file; shipped: ds_configs/zero1.json, .*zero3_offload"):
        find_ds_config("ds_configs/zero9.json")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{}")  # the user's own file takes precedence
    assert find_ds_config("ds_configs/zero3.json").read_text() == "{}"


def settings_of(path: Path, tree: dict, dtype: torch.dtype = torch.bfloat16) -> dict:
    path.write_text(json.dumps(tree))
    return deepspeed_config(TrainConfig(ds_config=str(path), max_grad_norm=0.5), dtype, 3)


def test_the_file_is_completed_from_the_configuration(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    assert settings["zero_optimization"] == {"stage": 2}
    assert (settings["gradient_clipping"], settings["gradient_accumulation_steps"]) == (0.5, 3)
    assert settings["bf16"] == {"enabled": True}
    assert settings_of(tmp_path / "ds.json", {}, torch.float32)["bf16"] == {"enabled": False}


@pytest.mark.parametrize("key", _CONFIG_OWNED)
def test_a_key_that_the_configuration_owns_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"ds\.json: `{key}` is set here and by (train|model)\."):
        settings_of(tmp_path / "ds.json", {key: 1})


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{stage: 3}")
    with pytest.raises(ValueError, match=r"ds\.json: not valid JSON"):
        deepspeed_config(TrainConfig(ds_config=str(tmp_path / "ds.json")), torch.float32, 1)


def test_weights_on_nvme_need_libaio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    found = False
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: found)
    monkeypatch.setenv("BPO_NVME", str(tmp_path))
    config = TrainConfig(ds_config="ds_configs/zero3_nvme.json")
    with pytest.raises(ValueError, match="zero3_nvme.json: offload_param.device is nvme, which requires libaio"):
        deepspeed_config(config, torch.bfloat16, 1)
    found = True
    zero = deepspeed_config(config, torch.bfloat16, 1)["zero_optimization"]
    assert zero["offload_param"]["nvme_path"] == str(tmp_path)
    with pytest.raises(
        ValueError, match="DeepSpeed 0.19.8 stops in the second step .*use ds_configs/zero3_offload.json"
    ):
        check_settings({"zero_optimization": zero})


def test_float16_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16 is unsupported in training"):
        settings_of(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}}, torch.float16)


def test_buckets_are_no_larger_than_the_gradients() -> None:
    """DeepSpeed allocates them in full, two per backward pass: 1.6 GB in fp32 for an adapter of any size."""
    shipped = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 200_000_000, "overlap_comm": True}, "bf16": {}}
    fitting = with_fitting_buckets(shipped, 80_000)
    assert fitting["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 80_000, "overlap_comm": True}
    assert shipped["zero_optimization"]["reduce_bucket_size"] == 200_000_000 and "bf16" in fitting
    assert with_fitting_buckets(shipped, 7_000_000_000) is shipped
    assert with_fitting_buckets({"zero_optimization": {"stage": 3}}, 5)["zero_optimization"]["reduce_bucket_size"] == 5
    for others in (
        {},
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
    ):
        assert with_fitting_buckets(others, 5) is others
