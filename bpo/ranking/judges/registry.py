"""Makes the judge that `rank.judge` names; only its own module is imported."""

from __future__ import annotations

import importlib

from bpo.config.entry import nearest
from bpo.config.training import Config
from bpo.job.launch import Ranks
from bpo.job.plugins import load_plugin_file
from bpo.ranking.judge import JUDGES, Judge

BUILT_IN = ("chair", "claims", "command", "implicit", "reward", "server", "verifier")


def make_judge(config: Config, ranks: Ranks) -> tuple[Judge, dict[str, str]]:
    """The judge, and the SHA-256 of `rank.plugin` if that is set, for the identity of its scores.

    Raises:
        ValueError: The name is unknown, the plug-in fails, or the judge refuses its options.
    """
    name = config.rank.judge
    if name in BUILT_IN:
        importlib.import_module(f"bpo.ranking.judges.{name}")
    digest = load_plugin_file(config.rank.plugin, "rank.plugin")
    if name not in JUDGES:
        raise ValueError(f"rank.judge is {name!r}{nearest(name, sorted({*BUILT_IN, *JUDGES}))}")
    return JUDGES[name].make(config, ranks), {"plugin (SHA-256)": digest} if digest else {}
