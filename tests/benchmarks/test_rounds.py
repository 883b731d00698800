"""The comparison of rounds: its table, and the configurations that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.rounds.__main__ import COMPARED, parse, sizes_of
from benchmarks.rounds.report import METRICS, summary, table
from bpo.config.io import load_config
from bpo.rounds.plan import plan_rounds
from bpo.tools.demo.files import build_world
from bpo.tools.demo.rounds import METHODS, overlay, recipe_file

VALUES = {"chair/chair_i": 0.25, "chair/recall": 0.8, "chair/mean_answer_words": 11.0, "pope/accuracy": 0.75}


def test_the_table_has_medians_and_ranges_over_seeds() -> None:
    rows = [
        {
            "seed": seed,
            "method": "sapo",
            "round": 1,
            "metrics": VALUES | {"chair/chair_i": chair},
            "seconds": {"train": 10.0 * (seed + 1), "export": 1.0},
            "pairs": 100 + seed,
        }
        for seed, chair in enumerate((0.3, 0.1, 0.2))
    ]
    base = {"seed": 0, "method": "base", "round": 0, "metrics": VALUES, "seconds": {}}
    lines = table(summary([base, *rows])).splitlines()
    assert lines[0] == f"| method | round | {' | '.join(METRICS)} | pairs | seconds |"
    assert lines[2] == "| base | 0 | 25.0 | 80.0 | 11.0 | 75.0 |  |  |"
    assert lines[3].startswith("| sapo | 1 | 20.0 (10.0-30.0) | 80.0 (80.0-80.0) | 11.0 (11.0-11.0) |")
    assert lines[3].endswith("| 101 | 21 |")


def test_every_compared_method_is_two_rounds_of_equal_steps_or_one_of_both(tmp_path: Path) -> None:
    sizes, world_config, _ = sizes_of(quick=True)
    world = build_world(tmp_path / "world", world_config, progress=False)
    for method in COMPARED:
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(overlay(method, tmp_path / "base", world, tmp_path / method, sizes)))
        config = load_config(["--config", str(recipe_file(method)), "--config", str(path)])
        steps = [s.options["train"]["max_steps"] for s in plan_rounds(config) if s.name == "train"]
        assert sum(steps) == 2 * sizes.steps and len(steps) == len(METHODS[method].each)


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--methods", "sapoo"])
    assert "--methods one of bpo-one-round" in capsys.readouterr().err
