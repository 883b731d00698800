"""The comparison of decodings on a small world, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decoding.__main__ import main, summary, table
from benchmarks.decoding.cells import DECODINGS, FIGURES, MODELS, cell_path, run_cell
from benchmarks.methods.cells import Comparison, Seed
from bpo.tools.demo.files import build_world
from bpo.tools.demo.methods import MethodGroups


@pytest.fixture
def seed(tmp_path: Path, tiny_llava_dir: Path) -> Seed:
    """A world of four scenes, and a random model as its base."""
    sizes = Comparison(num_annotations=4, num_evaluation_scenes=4)
    world = build_world(tmp_path / "seed-0" / "world", sizes.world(0), progress=False)
    (tmp_path / "seed-0" / "base").symlink_to(tiny_llava_dir)
    groups = MethodGroups(**{name: tmp_path / name for name in ("shared", "difficulty", "corrected", "started")})
    return Seed(0, tmp_path / "seed-0", world, groups)


def test_a_cell_has_figures_and_costs_and_is_kept(tmp_path: Path, seed: Seed) -> None:
    sizes = replace(Comparison(), num_evaluation_scenes=4, max_new_tokens=2)
    cells = {
        name: run_cell(tmp_path, sizes, seed, "base", name) for name in ("plain", "vdd none", "calibration sample")
    }
    assert all(set(FIGURES.values()) <= set(cell["metrics"]) for cell in cells.values())
    assert [cell["cost"]["relative_forward_passes"] for cell in cells.values()][:2] == [1.0, 2.0]
    # The captions have no labels, so they are decoded plainly.
    assert cells["calibration sample"]["metrics"]["chair/chair_i"] == cells["plain"]["metrics"]["chair/chair_i"]
    counted = cells["calibration sample"]["cost"]
    assert counted["uncalibrated"] == 4 and counted["calibrated"] > 4
    path = cell_path(tmp_path, "base", "plain", 0)
    path.write_text(path.read_text().replace('"seconds"', '"kept": 1, "seconds"'))
    assert run_cell(tmp_path, sizes, seed, "base", "plain")["kept"] == 1
    assert "kept" not in run_cell(tmp_path, replace(sizes, max_new_tokens=1), seed, "base", "plain")


def cell(model: str, decoding: str, seed: int) -> dict[str, Any]:
    metrics = {metric: 0.1 * (seed + 1) for metric in FIGURES.values()}
    made = {"model": model, "decoding": decoding, "seed": seed, "metrics": metrics, "seconds": 2.0}
    if decoding == "grid":
        made |= {
            "metrics": {"chair/chair_i": 0.05},
            "grid": [{"chosen": "top_k=5"}],
            "runs": 9,
            "plain": {"chair/chair_i": 0.06},
        }
    return {**made, "cost": {"relative_forward_passes": 2.0 if decoding == "vcd" else 1.0}}


def test_the_table_has_a_row_per_model_and_decoding() -> None:
    rows = summary([cell(model, decoding, seed) for model in MODELS for decoding in DECODINGS for seed in range(3)])
    lines = [[entry.strip() for entry in line.strip("|").split("|")] for line in table(rows).splitlines()]
    assert len(lines) == 2 + len(MODELS) * (len(DECODINGS) + 1)
    found = {(line[0], line[1]): line[2:] for line in lines[2:]}
    assert found["bpo", "vcd"] == [*["20.0 (10.0 to 30.0)"] * 6, "x2.0", "2.0"]
    assert found["base", "grid"] == ["5.0", *["-"] * 5, "x1.0, 9 runs", "2.0"]
    assert found["base", "plain, on the grid's half"][0] == "6.0"
    assert rows[-2]["grid"]["2"] == [{"chosen": "top_k=5"}]


def test_results_of_other_sizes_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps({"steps": 93}))
    assert main(["--quick", "--output", str(tmp_path)]) == 2
    assert "it has results of other sizes; give another folder" in capsys.readouterr().err
