"""Run record: resolved configuration, commit and versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bpo
from bpo.config.io import to_tree
from bpo.config.training import Config
from bpo.job.durable import write_durably
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


def save_config(config: Config, path: Path) -> None:
    """Replaces `path` as a whole with the resolved configuration, as YAML."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, yaml.safe_dump(to_tree(config), sort_keys=False), sync=False)


def write_run_record(config: Config, output_dir: Path) -> None:
    """Writes config.yaml and versions.txt, before any work, so that failed runs have them too."""
    save_config(config, output_dir / "config.yaml")
    lines = [f"commit: {source_commit('bpo', 'kernels', 'ds_configs')}"]
    lines += [f"{name}: {number}" for name, number in versions().items()]
    write_durably(output_dir / "versions.txt", "\n".join(lines) + "\n", sync=False)
