"""Run record: resolved configuration, commit and versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bpo
from bpo.config.io import save_config
from bpo.config.training import Config
from bpo_kernels.provenance import source_commit

PACKAGES = ("torch", "transformers", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Versions of bpo (from its sources, which need not be installed) and of the packages that affect its results."""
    return {"bpo": bpo.__version__, **{name: version_of(name) for name in PACKAGES}}


def version_of(distribution: str) -> str:
    """The installed version, without importing the package; "not installed" if there is no record of one."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def write_run_record(config: Config, output_dir: Path) -> None:
    """Writes config.yaml and versions.txt, before any work, so that failed runs have them too."""
    save_config(config, output_dir / "config.yaml")
    lines = [f"commit: {source_commit('bpo', 'kernels', 'ds_configs')}"]
    lines += [f"{name}: {number}" for name, number in versions().items()]
    (output_dir / "versions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
