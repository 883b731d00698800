"""Loads a plug-in: a Python file or an installed entry point that registers losses, views and rules.

A plug-in imports `register_loss`, `register_weighting`, `register_pairs`, `register_token_weights` and `register_view`
from here. docs/examples/plugin.py is an example.
"""

from __future__ import annotations

from typing import Any

from bpo.data.cells import register_pairs
from bpo.data.token_weights import register_token_weights
from bpo.data.views import register_view
from bpo.job.plugins import load_plugin_file, plugin_key
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

ENTRY_POINTS = "bpo.losses"


def load_plugin(plugin: str) -> str:
    """Runs `loss.plugin` once per process; returns its digest: see `load_plugin_file`."""
    return load_plugin_file(plugin, "loss.plugin", ENTRY_POINTS)


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
    return PluginDigest(plugin_key(plugin), digest) if plugin else ""


def _load_again(plugin: str, digest: str) -> PluginDigest:
    if load_plugin(plugin) != digest:
        raise ValueError(f"loss.plugin {plugin}: the file has changed since this job started; start the job again")
    return PluginDigest(plugin, digest)
