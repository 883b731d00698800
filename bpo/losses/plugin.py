"""Loads a plug-in: a Python file or an installed entry point that registers losses, views and rules.

A plug-in imports `register_loss`, `register_weighting`, `register_pairs`, `register_token_weights` and `register_view`
from here. docs/examples/plugin.py is an example.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from bpo.data.cells import register_pairs
from bpo.data.token_weights import register_token_weights
from bpo.data.views import register_view
from bpo.losses.registry import register_loss, register_weighting

__all__ = [
    "PluginDigest",
    "load_plugin",
    "plugin_digest",
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
    """Runs a plug-in once per process; returns the SHA-256 of the source that was run, or "" if `plugin` is empty.

    A file that is edited later has no effect on this process.

    Raises:
        ValueError: there is no such file or entry point, or it fails; names the line.
    """
    if not plugin:
        return ""
    key = _key(plugin)
    if key not in _loaded:
        path, module = _source(plugin)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _run(path, module, digest, plugin)
        _loaded[key] = digest
        logger.info("loss.plugin %s: %s, SHA-256 %s", plugin, path, digest[:12])
    return _loaded[key]


class PluginDigest(str):
    """What `load_plugin` returns. Unpickling it in another process, such as a data worker, loads the plug-in there.

    plugin: the absolute path of the file, or the name of the entry point.
    """

    plugin: str

    def __new__(cls, plugin: str, digest: str) -> PluginDigest:
        made = super().__new__(cls, digest)
        made.plugin = plugin
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (self.plugin, str(self))


def plugin_digest(plugin: str) -> str:
    """As `load_plugin`, in a form that takes the plug-in along into worker processes."""
    digest = load_plugin(plugin)
    return PluginDigest(_key(plugin), digest) if plugin else ""


def _load_again(plugin: str, digest: str) -> PluginDigest:
    if load_plugin(plugin) != digest:
        raise ValueError(f"loss.plugin {plugin}: the file has changed since this job started; start the job again")
    return PluginDigest(plugin, digest)


def _key(plugin: str) -> str:
    return str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin


def _source(plugin: str) -> tuple[Path, str]:
    """The file of a plug-in, and its module's name if it is installed."""
    if plugin.endswith(".py"):
        path = Path(plugin).resolve()
        if not path.is_file():
            raise ValueError(f"loss.plugin {plugin}: no such file ({path})")
        return path, ""
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if plugin not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise ValueError(f"loss.plugin {plugin}: neither a .py file nor an entry point of {ENTRY_POINTS} ({known})")
    module = found[plugin].module
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # of a parent package, which this imports
        message = f"its module {module} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(f"loss.plugin {plugin}: {message}") from error
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"loss.plugin {plugin}: its module {module} is not a Python file")
    return Path(spec.origin), module


def _run(path: Path, module: str, digest: str, plugin: str) -> None:
    try:
        if module:
            importlib.import_module(module)
        else:
            _run_file(path, f"bpo_plugin_{digest[:16]}")
    except Exception as error:
        message = f"{_line_of(error, path)}: {type(error).__name__}: {error}"
        raise ValueError(f"loss.plugin {plugin}: {message}") from error


def _run_file(path: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _line_of(error: BaseException, path: Path) -> str:
    """The last line of the plug-in on the way to the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}"
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}"
