"""Stages of a round: the command of each, its script on SLURM, and the file that says it is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.checkpoint.files import finished_step
from bpo.job.exits import read_status


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of stage.

    Attributes:
        command: Words of the `bpo` command; `--config FILE` follows.
        jobs: (script of slurm/, words before `--config FILE`) of each job that runs it on SLURM, in order.
        decided_by: Sections of the configuration on which its results depend.
        shared: Whether several processes share the work.
    """

    command: tuple[str, ...]
    jobs: tuple[tuple[str, tuple[str, ...]], ...]
    decided_by: tuple[str, ...]
    shared: bool = False


_TRAIN = ("model", "data", "lora", "trainable", "loss", "train", "online")
KINDS: dict[str, Kind] = {
    "images": Kind(("rank", "--images"), (("command.sh", ("rank", "--images")),), ("data", "rank")),
    "generate": Kind(
        ("bootstrap",),
        (("bootstrap.sh", ()), ("command.sh", ("merge",))),
        ("model", "data", "bootstrap"),
        shared=True,
    ),
    "judge": Kind(("rank",), (("rank.sh", ()),), ("model", "data", "rank", "evaluation"), shared=True),
    "select": Kind(("select",), (("command.sh", ("select",)),), ("select",)),
    "reference": Kind(("train",), (("train.sh", ()),), _TRAIN, shared=True),
    "train": Kind(("train",), (("train.sh", ()),), _TRAIN, shared=True),
    "export": Kind(("export",), (("command.sh", ("export",)),), ("export",)),
    "evaluate": Kind(("evaluate",), (("evaluate.sh", ()),), ("model", "data", "evaluation"), shared=True),
}


@dataclass(frozen=True)
class Stage:
    """One stage of one round.

    Attributes:
        round: From 1; 0 for what precedes the rounds.
        name: Key of `KINDS`.
        folder: Folder of the round.
        options: The resolved configuration, by section.
    """

    round: int
    name: str
    folder: Path
    options: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def label(self) -> str:
        return f"round {self.round}, {self.name}" if self.round else self.name

    @property
    def config_file(self) -> Path:
        return self.folder / f"{self.name}.yaml"

    @property
    def log_file(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def result(self) -> Path:
        """The file or folder that it writes."""
        return self.folder / _RESULTS[self.name]

    def is_finished(self) -> bool:
        """Whether its result is complete. Every stage writes the file that is asked for here last, and atomically."""
        return _FINISHED.get(self.name, Path.exists)(self.result)


def trained_steps(run: Path) -> tuple[int, int]:
    """(steps done, steps planned) of a run's latest checkpoint; (0, 0) without one."""
    return finished_step(run) or (0, 0)


def _is_trained(run: Path) -> bool:
    done, planned = trained_steps(run)
    return 0 < done == planned


_RESULTS = {
    "images": "annotations.jsonl",
    "generate": "candidates.jsonl",
    "judge": "judgements",
    "select": "groups.jsonl",
    "reference": "reference",
    "train": "run",
    "export": "policy",
    "evaluate": "results.json",
}
_FINISHED: dict[str, Callable[[Path], bool]] = {
    "judge": lambda folder: (folder / "summary.json").exists(),
    "reference": lambda folder: read_status(folder).get("exit_code") == 0,
    "train": _is_trained,
    "export": lambda folder: (folder / "bpo_export.json").exists(),
}
