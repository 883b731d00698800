"""Loads a plug-in, once per process: a Python file or an installed entry point that registers things of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

_loaded: dict[str, str] = {}


def load_plugin_file(plugin: str, option: str, group: str = "") -> str:
    """Runs a plug-in once per process; returns the SHA-256 of the source that was run, or "" if `plugin` is empty.

    A file that is edited later has no effect on this process.

    Args:
        plugin: Path of a .py file, or the name of an entry point.
        option: Name of the option that names it, for messages.
        group: Group of the entry points; empty takes only files.

    Raises:
        ValueError: There is no such file or entry point, or it fails; names the line.
    """
    if not plugin:
        return ""
    key = plugin_key(plugin)
    if key not in _loaded:
        path, module = _source(plugin, option, group)
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        _run(path, module, content, f"{option} {plugin}", f"bpo_plugin_{digest[:16]}")
        _loaded[key] = digest
        logger.info("%s %s: %s, SHA-256 %s", option, plugin, path, digest[:12])
    return _loaded[key]


def plugin_key(plugin: str) -> str:
    """The absolute path of a plug-in's file, or the name of its entry point."""
    return str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin


def _source(plugin: str, option: str, group: str) -> tuple[Path, str]:
    """The file of a plug-in, and its module's name if it is installed."""
    if plugin.endswith(".py"):
        path = Path(plugin).resolve()
        if not path.is_file():
            raise ValueError(f"{option} {plugin}: no such file ({path})")
        return path, ""
    if not group:
        raise ValueError(f"{option} {plugin}: not a .py file")
    found = {point.name: point for point in entry_points(group=group)}
    if plugin not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise ValueError(f"{option} {plugin}: neither a .py file nor an entry point of {group} ({known})")
    module = found[plugin].module
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # of a parent package, which this imports
        message = f"its module {module} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(f"{option} {plugin}: {message}") from error
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"{option} {plugin}: its module {module} is not a Python file")
    return Path(spec.origin), module


def _run(path: Path, module: str, content: bytes, what: str, name: str) -> None:
    try:
        if module:
            importlib.import_module(module)
        else:
            _run_file(path, content, name)
    except Exception as error:
        raise ValueError(f"{what}: {_line_of(error, path)}: {type(error).__name__}: {error}") from error


def _run_file(path: Path, content: bytes, name: str) -> None:
    """Runs what was read, and no bytecode from a cache: that of a file of the same size and second would be used."""
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
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
