"""From 1 to 1,024 GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.tools.plan.command import main
from bpo.tools.plan.scale import Storage, machines
from bpo.tools.plan.speed import Machine
from bpo.training.hardware import accelerator


def test_sizes_are_parts_of_a_node_then_whole_nodes() -> None:
    sizes = [(one.nodes, one.gpus_per_node) for one in machines(Machine(accelerator("h100"), nodes=3, gpus_per_node=4))]
    assert sizes[:4] == [(1, 1), (1, 2), (1, 4), (2, 4)] and sizes[-1] == (256, 4)
    odd = [one.world_size for one in machines(Machine(accelerator("h100"), gpus_per_node=6))]
    assert odd == [1, 2, 4, 6, 12, 24, 48, 96, 192, 384, 768]


def test_a_file_system_is_as_fast_as_its_ranks_or_its_limit() -> None:
    storage = Storage(total_gb_s=10, rank_gb_s=2)
    assert [storage.seconds(40e9, ranks) for ranks in (1, 4, 5, 1024)] == [20, 5, 4, 4]


def test_the_table_of_a_model_that_needs_several_nodes(
    tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a slow network: copies per node win from the second node on, where ZeRO-3 is needed at all."""
    path = tmp_path / "plan.json"
    options = ("--gpu", "h100", "--language", "lora", "--groups-count", "1000", "--gpus-per-node", "2")
    assert main(["--model", str(tiny_llava_dir), *options, "--scale", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["scale"]
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    speeds = [row["groups_per_s"] for row in rows]
    assert speeds == sorted(speeds) and speeds[-1] > 500 * speeds[0]
    for row in rows:
        assert row["step"] == min(row["seconds_of_files"].values())
        assert row["seconds_of_files"][row["wins"].split()[0]] == row["step"]
        assert row["groups_per_step"] == rows[0]["groups_per_step"] * row["gpus"]
    several = [row["seconds_of_files"] for row in rows if row["nodes"] > 1]
    assert all(times["zero3_hpz"] < times["zero3"] for times in several)
    assert rows[0]["seconds_of_files"]["zero3_hpz"] == rows[0]["seconds_of_files"]["zero3"]
    # 3 answers of 150 tokens in fp32, and 52 bytes of the index.
    assert rows[0]["store_gb"] == pytest.approx(1000 * (3 * 150 * 4 + 52) / 1e9)
    assert rows[3]["reference_hours"] == pytest.approx(rows[0]["reference_hours"] / 8)
    text = capsys.readouterr().out
    assert f"GPUs: 1, {rows[0]['wins'].split()[0]}: " in text and "computed, not measured" in text
