"""Options of experiment trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpo.config.options import Section

Tracker = Literal["wandb", "mlflow", "trackio"]


@dataclass(kw_only=True)
class TrackingConfig(Section):
    """Experiment trackers, in addition to metrics.jsonl and TensorBoard (`train.tensorboard`).

    Attributes:
        to: Trackers to write to, each by its own library (extras wandb, mlflow, trackio). Keys and addresses come from
            the environment and files of that library, never from options.
        project: Name of the project or experiment.
        run_name: Name of the run; empty uses that of train.output_dir.
        offline: Write to train.output_dir only, without a network.
    """

    where = "tracking"

    to: list[Tracker] = field(default_factory=list)
    project: str = "bpo"
    run_name: str = ""
    offline: bool = False
