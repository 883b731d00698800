"""What a run was: its resolved configuration, the commit and the versions."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

from bpo.config import Config
from bpo.config_io import save_config

PACKAGES = ("bpo", "torch", "transformers", "deepspeed", "peft")


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def write_run_record(config: Config, output_dir: Path) -> None:
    """Writes config.yaml and versions.txt: first of all, so that even a failed run can be read."""
    save_config(config, output_dir / "config.yaml")
    clone = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    lines = [f"commit: {git.stdout.strip() or 'not a git clone'}"]
    lines += [f"{name}: {number}" for name, number in versions().items()]
    (output_dir / "versions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
