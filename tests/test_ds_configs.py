"""The DeepSpeed files."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest

from bpo.config.ds_file import complete_zero

# name -> (ZeRO stage, what is offloaded)
EXPECTED = {
    "zero1": (1, set()),
    "zero2": (2, set()),
    "zero3": (3, set()),
    "zero2_offload": (2, {"optimizer"}),
    "zero3_offload": (3, {"optimizer", "param"}),
    "zero3_hpz": (3, set()),
    "zero3_nvme": (3, {"optimizer", "param"}),
}


def load(name: str) -> dict[str, Any]:
    text = importlib.resources.files("bpo_ds_configs").joinpath(f"{name}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def test_exactly_these_files_are_there_and_the_readme_names_each(repo_root: Path) -> None:
    names = {path.stem for path in (repo_root / "ds_configs").glob("*.json")}
    assert names == set(EXPECTED)
    readme = (repo_root / "ds_configs" / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if f"`{name}.json`" not in readme]


@pytest.mark.parametrize("name", EXPECTED)
def test_file_holds_only_zero_and_deepspeed_takes_it_as_meant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monkeypatch.setenv("BPO_NVME", str(tmp_path))
    config = load(name)
    assert set(config) - {"aio"} == {"zero_optimization"}, (
        "batch, learning rate, clipping and precision belong to the run"
    )
    completed = complete_zero(config, Path(name), world_size=16, ranks_per_node=8)["zero_optimization"]
    parsed = DeepSpeedZeroConfig(**completed)
    assert parsed.zero_hpz_partition_size == (8 if name == "zero3_hpz" else 1)
    stage, offloaded = EXPECTED[name]
    assert parsed.stage == stage
    devices = {"optimizer": parsed.offload_optimizer, "param": parsed.offload_param}
    assert {part for part, setting in devices.items() if setting is not None} == offloaded
    expected = {"optimizer": "cpu", "param": "nvme" if name == "zero3_nvme" else "cpu"}
    assert all(setting.device == expected[part] for part, setting in devices.items() if setting is not None)
    unknown = set(config["zero_optimization"]) - {
        alias for key, field in DeepSpeedZeroConfig.model_fields.items() for alias in (key, field.alias)
    }
    assert not unknown, f"DeepSpeed ignores {sorted(unknown)}"
    if stage == 3:
        assert parsed.gather_16bit_weights_on_model_save
