"""`bpo rounds --jobs`, as slurm/rounds.sh reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bpo.config.io import to_tree
from bpo.rounds.command import main
from bpo.rounds.plan import plan_rounds
from tests.rounds.jobs import rounds_config, write_result


def test_jobs_of_unfinished_stages_are_printed_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = rounds_config(tmp_path, [{}], rank={"judge": "chair"})
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(to_tree(config)))
    stages = {stage.name: stage for stage in plan_rounds(config)}
    stages["generate"].folder.mkdir(parents=True)
    write_result(stages["generate"])
    assert main(["--config", str(path), "--jobs"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    files = [["--config", str(stages[name].config_file)] for name in ("judge", "select", "train", "export")]
    assert lines == [
        ["r1-judge", "rank.sh", *files[0]],
        ["r1-select", "command.sh", "select", *files[1]],
        ["r1-train", "train.sh", *files[2]],
        ["r1-export", "command.sh", "export", *files[3]],
    ]
    assert all(Path(file).is_file() for _, file in files)
    assert [script for script, _ in stages["generate"].kind.jobs] == ["bootstrap.sh", "command.sh"]
