"""The table of `bpo rounds --status`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.rounds.run import run_rounds
from bpo.rounds.status import status_table
from tests.rounds.jobs import MadeUp, rounds_config


def test_the_table_has_every_stage_its_numbers_and_the_metrics_by_round(tmp_path: Path) -> None:
    config = rounds_config(tmp_path, [{}, {}], rounds={"evaluate": True})
    with pytest.raises(KeyboardInterrupt):
        run_rounds(config, run=MadeUp((2, "train"), KeyboardInterrupt()))
    first, second = tmp_path / "runs" / "round-1", tmp_path / "runs" / "round-2"
    (first / "groups.jsonl.summary.json").write_text(json.dumps({"num_groups": 1200, "num_pairs": 2400}))
    (first / "results.json").write_text(json.dumps({"metrics": {"chair/chair_i": 0.1234, "chair/recall": 0.8}}))
    (second / "run").mkdir()
    lines = [line.split() for line in status_table(tmp_path / "runs").splitlines()]
    assert lines[0][:3] == ["round", "stage", "state"]
    assert ["1", "select", "finished", "1,200", "groups,", "2,400", "pairs", "0.0"] in lines
    assert ["1", "train", "finished", "step", "4", "of", "4", "0.0"] in lines
    assert ["2", "select", "finished", "0.0"] in lines
    assert ["2", "train", "begun"] in lines
    assert ["2", "export", "waiting"] in lines
    assert lines[-2:] == [["round", "chair/chair_i", "chair/recall"], ["1", "0.1234", "0.8"]]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.yaml; give the rounds.output_dir"):
        status_table(tmp_path)
