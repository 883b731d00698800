"""Reads the configuration from YAML files and dotted flags, and writes the resolved configuration.

`load_config(["--config", "FILE", "--train.lr", "1e-5"])` returns a `Config`. An unknown key is an error that suggests
the closest match. Options common to all data commands have the short names in `ALIASES`.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from bpo.config.training import Config

ALIASES = {"--on-bad": "--data.on_bad", "--max-bad-share": "--data.max_bad_share"}


def all_keys(node: type = Config, prefix: str = "") -> list[str]:
    """Returns all dotted keys of the tree, such as `train.lr`, including sections."""
    keys = []
    for entry in fields(node):
        keys.append(prefix + entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default  # type: ignore[misc]
        if is_dataclass(default):
            keys += all_keys(type(default), f"{prefix}{entry.name}.")
    return keys


def check_keys(tree: dict[str, Any], source: str, prefix: str = "", keys: list[str] | None = None) -> None:
    """Raises ValueError if `tree` has an empty section or an unknown key; suggests the closest match."""
    known = all_keys() if keys is None else keys
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted not in known:
            raise ValueError(f"{source}: unknown key `{dotted}`{_nearest(dotted, known)}")
        is_section = any(other.startswith(f"{dotted}.") for other in known)
        if is_section and not isinstance(value, dict):
            raise ValueError(f"{source}: section `{dotted}` is {value!r}, not a mapping of keys; add keys or remove it")
        if isinstance(value, dict):
            check_keys(value, source, f"{dotted}.", known)


def _nearest(dotted: str, known: list[str]) -> str:
    leaf = dotted.rsplit(".", 1)[-1]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    whole = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)
    close = [by_leaf[last[0]]] if last and last[0] == leaf else whole or [by_leaf[name] for name in last]
    return f"; did you mean `{close[0]}`?" if close else "; `--help` lists every key"


def load_config(argv: list[str], prog: str = "bpo", description: str = "") -> Config:
    """Parses `--config FILE` (YAML; several files are merged in order) and dotted overrides into a `Config`.

    Raises:
        ValueError: A key is unknown or a value out of range; names the key and the closest match.
        SystemExit: `--help` was given, or a value has the wrong type (jsonargparse's message names the key).
    """
    import yaml
    from jsonargparse import ArgumentParser

    short = "; ".join(f"{alias} is short for {flag}" for alias, flag in ALIASES.items())
    parser = ArgumentParser(prog=prog, description=description, epilog=short, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file; later files and flags take precedence.")
    parser.add_class_arguments(Config, as_group=False)
    argv = ["=".join([ALIASES.get(name, name), *value]) for name, *value in (flag.split("=", 1) for flag in argv)]
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name = flag.split("=", 1)[0]
        if name == "--config":
            path = Path(flag.split("=", 1)[1] if "=" in flag else value)
            if not path.is_file():
                raise ValueError(f"--config {path}: no such file")
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(tree, dict):
                raise ValueError(f"--config {path}: expected a mapping of sections, found {type(tree).__name__}")
            check_keys(tree, str(path))
        elif name.startswith("--") and name not in ("--help", "--print_config") and name[2:] not in all_keys():
            raise ValueError(f"unknown flag `{name}`{_nearest(name[2:], all_keys())}")
    namespace = parser.parse_args(argv)
    built = parser.instantiate(namespace)
    return Config(**{entry.name: built[entry.name] for entry in fields(Config)})


def to_tree(config: Config) -> dict[str, Any]:
    """Returns the resolved configuration as nested dictionaries, for YAML or JSON."""
    return asdict(config)


def save_config(config: Config, path: Path) -> None:
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_tree(config), sort_keys=False), encoding="utf-8")
