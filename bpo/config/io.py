"""Reads the configuration from YAML files and dotted flags, and writes the resolved configuration.

`load_config(["--config", "FILE", "--train.lr", "1e-5"])` returns a `Config`. An unknown key is an error that suggests
the closest match, or translates the name that another trainer gives to the option. Options common to all data commands
have the short names in `ALIASES`.
"""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from bpo.config.foreign import translation
from bpo.config.training import Config, missing_model

ALIASES = {
    "--on-bad": "--data.on_bad",
    "--max-bad-share": "--data.max_bad_share",
    "--suite": "--evaluation.suite",
    "--answers": "--evaluation.answers",
    "--questions": "--evaluation.questions",
    "--format": "--evaluation.format",
    "--push": "--export.push",
}


def all_keys(node: type = Config, prefix: str = "") -> list[str]:
    """Returns all dotted keys of the tree, such as `train.lr`, including sections."""
    keys = []
    for entry in fields(node):
        keys.append(prefix + entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default  # type: ignore[misc]
        if is_dataclass(default):
            keys += all_keys(type(default), f"{prefix}{entry.name}.")
    return keys


def check_keys(tree: dict[str, Any], source: str) -> None:
    """Raises ValueError if `tree` has an empty section or unknown keys; names all, each with the closest match."""
    problems = list(_problems(tree, all_keys()))
    if problems:
        raise ValueError(f"{source}: {'. '.join(problems)}")


def _problems(tree: dict[str, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        is_section = bool(_such_as(dotted, known))
        if dotted not in known:
            yield f"unknown key `{dotted}`{_nearest(dotted, known)}"
        elif is_section and not isinstance(value, dict):
            example = _such_as(dotted, known)
            yield f"section `{dotted}` is {value!r}, not a mapping of keys; add keys{example} or remove it"
        elif is_section:
            yield from _problems(value, known, f"{dotted}.")


def _such_as(section: str, known: list[str]) -> str:
    """The first option of a section, for messages; empty if it is none."""
    return next((f" such as `{key}`" for key in known if key.startswith(f"{section}.")), "")


def _nearest(dotted: str, known: list[str]) -> str:
    leaf = dotted.rsplit(".", 1)[-1]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    if leaf not in by_leaf and (meaning := translation(leaf)):
        return meaning
    whole = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)
    close = [by_leaf[last[0]]] if last and last[0] == leaf else whole or [by_leaf[name] for name in last]
    return f"; did you mean `{close[0]}`?" if close else "; `--help` lists every key"


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The sections of a YAML file, which `option` names in messages.

    Raises:
        ValueError: it is not readable, not YAML or not a mapping, or a key occurs twice; names file and line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"`{key.value}` occurs twice", problem_mark=key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        tab = "a tab; indent with spaces" if "'\\t'" in str(error.problem) else error.problem
        raise ValueError(f"{option} {path}: {line}{tab}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{option} {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{option} {path}: expected a mapping of sections, found {type(tree).__name__}")
    return _with_on(tree)


@functools.cache
def _read_on_as_text() -> None:
    """Makes jsonargparse read the key `on` of a loss term as text: YAML 1.1 reads an unquoted `on` as true."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    set_loader("yaml", lambda text: _with_on(load(text)), exceptions=(yaml.YAMLError,))


def _with_on(value: Any) -> Any:
    if isinstance(value, dict):
        return {"on" if key is True else key: _with_on(item) for key, item in value.items()}
    return [_with_on(item) for item in value] if isinstance(value, list) else value


def train_inputs(config: Config) -> tuple[str, str]:
    """The options of `bpo train` that must name something that exists."""
    return "model.path", "data.annotations" if config.online.source else "data.groups"


def load_config(
    argv: list[str],
    prog: str = "bpo",
    description: str = "",
    reads: Sequence[str] | Callable[[Config], Sequence[str]] = (),
) -> Config:
    """Parses `--config FILE` (YAML; several files are merged in order) and dotted overrides into a `Config`.

    Args:
        reads: Options that must name something that exists, such as `data.groups`; or which these are, by the others.

    Raises:
        ValueError: A key is unknown, or a value of the wrong type or out of range; names the key and the closest match.
        SystemExit: `--help` was given.
    """
    from jsonargparse import ArgumentParser

    _read_on_as_text()
    short = "; ".join(f"{alias} is short for {flag}" for alias, flag in ALIASES.items())
    parser = ArgumentParser(prog=prog, description=description, epilog=short, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; later files and flags take precedence.")
    parser.add_class_arguments(Config, as_group=False)
    known = all_keys()
    argv = ["=".join([ALIASES.get(name, name), *value]) for name, *value in (flag.split("=", 1) for flag in argv)]
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name = flag.split("=", 1)[0]
        if name == "--config":
            path = Path(flag.split("=", 1)[1] if "=" in flag else value)
            check_keys(read_yaml(path), str(path))
        elif name.startswith("--") and name not in ("--help", "--print_config") and name[2:] not in known:
            raise ValueError(f"unknown flag `{name}`{_nearest(name[2:], known)}")
        elif name.startswith("--") and (example := _such_as(name[2:], known)):
            raise ValueError(f"`{name}` is a section of options{example}")
    try:
        namespace = parser.parse_args(argv)
    except (argparse.ArgumentError, OverflowError) as error:  # the latter: an integer beyond any float
        raise ValueError(f"{' '.join(str(error).split())}; `{prog} --help` lists every option") from error
    built = parser.instantiate(namespace)
    config = Config(**{entry.name: built[entry.name] for entry in fields(Config)})
    check_inputs(config, reads(config) if callable(reads) else reads)
    return config


def check_inputs(config: Config, reads: Sequence[str]) -> None:
    """Raises ValueError if an option of `reads` is empty or names nothing that exists."""
    values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in reads}
    if empty := [key for key, value in values.items() if not value.strip()]:
        flags = " ".join(f"--{key} PATH" for key in empty)
        raise ValueError(f"{' and '.join(empty)} must be set, in a file (--config FILE) or by {flags}")
    for key, value in values.items():
        fault = missing_model(value) if key == "model.path" else "" if Path(value).exists() else "no such file"
        if fault:
            raise ValueError(f"{key} is {value!r}: {fault}")


def to_tree(config: Config) -> dict[str, Any]:
    """Returns the resolved configuration as nested dictionaries, for YAML or JSON."""
    return asdict(config)


def flat_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_tree(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
