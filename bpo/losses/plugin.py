"""Loads a plug-in: a Python file or an installed entry point that registers losses, views and rules.

A plug-in imports `register_loss`, `register_weighting`, `register_pairs`, `register_token_weights` and `register_view`
from here. docs/methods.md has an example.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from bpo.data.cells import register_pairs
from bpo.data.token_weights import register_token_weights
from bpo.data.views import register_view
from bpo.losses.registry import register_loss, register_weighting

__all__ = [
    "load_plugin",
    "register_loss",
    "register_pairs",
    "register_token_weights",
    "register_view",
    "register_weighting",
]

logger = logging.getLogger(__name__)

ENTRY_POINTS = "bpo.losses"
_loaded: dict[str, str] = {}


def load_plugin(plugin: str) -> str:
    """Runs a plug-in once per process; returns the SHA-256 of its source, or "" if `plugin` is empty.

    Raises:
        ValueError: there is no such file or entry point, or it fails; names the line.
    """
    if not plugin:
        return ""
    path = _source(plugin)
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if _loaded.get(str(path)) != digest:
        _run(path, digest, plugin)
        _loaded[str(path)] = digest
        logger.info("loss.plugin %s: %s, SHA-256 %s", plugin, path, digest[:12])
    return digest


def _source(plugin: str) -> Path:
    if plugin.endswith(".py"):
        path = Path(plugin).resolve()
        if not path.is_file():
            raise ValueError(f"loss.plugin {plugin}: no such file ({path})")
        return path
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if plugin not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise ValueError(f"loss.plugin {plugin}: neither a .py file nor an entry point of {ENTRY_POINTS} ({known})")
    spec = importlib.util.find_spec(found[plugin].module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"loss.plugin {plugin}: its module {found[plugin].module} is not a Python file")
    return Path(spec.origin)


def _run(path: Path, digest: str, plugin: str) -> None:
    name = f"bpo_plugin_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        where = f"line {error.lineno}" if isinstance(error, SyntaxError) else _line_of(error, path)
        raise ValueError(f"loss.plugin {plugin}: {where}: {type(error).__name__}: {error}") from error


def _line_of(error: BaseException, path: Path) -> str:
    """The last line of the plug-in on the way to the error."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}"
