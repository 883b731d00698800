"""Whole runs with adapters and their exports: `python -m tests.model.levers.lora_job DIR`, as `policy_job`."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bpo.checkpoint.export import run_export
from bpo.config.training import Config, ExportConfig, LoraConfig
from bpo.job.launch import Ranks
from bpo.train import train
from tests.ranks import fork_ranks
from tests.training import policy_job

# By name: options of `lora`.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"kernel": "peft"},
    "grouped": {"kernel": "addmm"},
    "dropped": {"kernel": "addmm", "dropout": 0.3},
    "dora": {"variant": "dora", "dropout": 0.3},
}
EXPORTED = ("dropped", "dora")


def config_of(root: Path, name: str, **options: Any) -> Config:
    config = policy_job.config_of(root, name, "llava", save_every_steps=1, max_micro_batch_tokens=300, **options)
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, **RUNS["dropped" if name == "resumed" else name]}
    config.lora = LoraConfig(**lora)
    return config


def runs(root: Path, ranks: Ranks) -> None:
    for name in RUNS:
        train(config_of(root, name), ranks)
    shutil.copytree(root / "dropped", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000002")
    train(config_of(root, "resumed", resume=True), ranks)
    for name in EXPORTED:
        for form in ("adapter", "merged"):
            config = config_of(root, name)
            output = str(root / f"{name}-{form}")
            config.export = ExportConfig(checkpoint=str(root / name), output=output, form=form)  # type: ignore[arg-type]
            run_export(config)


if __name__ == "__main__":
    fork_ranks(1, partial(runs, Path(sys.argv[1])))
