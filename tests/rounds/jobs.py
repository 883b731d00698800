"""Rounds whose stages are made up: each writes its result and does nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bpo.config.training import Config
from bpo.job.signals import StopRequest
from bpo.rounds.stages import Stage


def rounds_config(root: Path, each: list[Mapping[str, Any]], **sections: Mapping[str, Any]) -> Config:
    tree = {
        "model": {"path": str(root / "base")},
        "data": {"annotations": "annotations.json"},
        "trainable": {"language": "full"},
        **sections,
    }
    tree["rounds"] = {"output_dir": str(root / "runs"), "each": each, **sections.get("rounds", {})}
    (root / "base").mkdir(exist_ok=True)
    (root / "base" / "config.json").write_text("{}")
    return _built(Config, tree)


def _built(kind: type, tree: Mapping[str, Any]) -> Any:
    """A section from a mapping, faster than from a file."""
    made = {}
    for entry in fields(kind):
        if entry.name in tree:
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            value = tree[entry.name]
            made[entry.name] = _built(type(default), value) if is_dataclass(default) else value
    return kind(**made)


class MadeUp:
    """Runs stages by writing their results; raises `fault` when it comes to the stage `fails_at`."""

    def __init__(self, fails_at: tuple[int, str] | None = None, fault: BaseException | None = None, code: int = 0):
        self.ran: list[tuple[int, str]] = []
        self.fails_at, self.fault, self.code = fails_at, fault, code

    def __call__(self, stage: Stage, processes: int, stop: StopRequest | None) -> int:
        self.ran.append((stage.round, stage.name))
        stage.log_file.write_text(f"log of {stage.label}\n")
        if (stage.round, stage.name) == self.fails_at:
            if self.fault is not None:
                raise self.fault
            return self.code
        write_result(stage)
        return 0


def write_result(stage: Stage) -> None:
    """What the commands write last."""
    if stage.name == "judge":
        stage.result.mkdir()
        (stage.result / "summary.json").write_text("{}")
    elif stage.name == "reference":
        stage.result.mkdir()
        (stage.result / "status.json").write_text('{"exit_code": 0}')
    elif stage.name == "train":
        checkpoint = stage.result / "checkpoints" / "step-00000004"
        checkpoint.mkdir(parents=True)
        write_manifest(
            checkpoint, {"format": 2, "step": 4, "cursor": {"steps_done": 4, "steps_planned": 4}, "files": {}}
        )
    elif stage.name == "export":
        stage.result.mkdir()
        (stage.result / "bpo_export.json").write_text("{}")
    else:
        stage.result.write_text("{}")


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    content = json.dumps(manifest)
    (checkpoint / "manifest.json").write_text(content)
    (checkpoint / "manifest.sha256").write_text(f"{hashlib.sha256(content.encode()).hexdigest()}  manifest.json\n")
