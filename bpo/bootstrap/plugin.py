"""Registers sources of a plug-in (`bootstrap.plugin`), a Python file that imports from here.

A source's answers may be those of `ImageAnswers` to other requests. docs/examples/source.py is an example.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bpo.bootstrap.completion_types import COMPLETION_TYPES, PROVENANCE_SOURCES
from bpo.bootstrap.engines.vision import Sampling, VisionGenerator, VisionRequest
from bpo.bootstrap.sources import ImageAnswers, NegativeSource
from bpo.config.bootstrap import SOURCES, BootstrapConfig
from bpo.config.training import Config
from bpo.job.plugins import load_plugin_file

__all__ = ["ImageAnswers", "NegativeSource", "Sampling", "VisionRequest", "load_sources", "register_source"]

SourceFactory = Callable[[Config, VisionGenerator, int], NegativeSource]

REGISTERED: dict[str, SourceFactory] = {}


def register_source(name: str, *, completion_type: str, provenance: str) -> Callable[[SourceFactory], SourceFactory]:
    """Registers a function that makes a source from the configuration, the multimodal model and a candidate's number.

    Args:
        name: For `bootstrap.sources`: lower-case letters, digits and hyphens.
        completion_type: `Completion.type` of its negatives.
        provenance: Their `Provenance.source`.

    Raises:
        ValueError: The name is taken or has other characters, or the type is taken.
    """
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise ValueError(f"a source named {name!r}: use lower-case letters, digits and hyphens")
    if name in COMPLETION_TYPES:
        raise ValueError(f"a source named {name!r} is already registered")
    if completion_type in ("gt", *COMPLETION_TYPES.values()):
        raise ValueError(f"completions of type {completion_type!r} are of another source; choose another type")

    def add(make: SourceFactory) -> SourceFactory:
        COMPLETION_TYPES[name], PROVENANCE_SOURCES[name] = completion_type, provenance
        REGISTERED[name] = make
        return make

    return add


def load_sources(options: BootstrapConfig) -> None:
    """Loads `bootstrap.plugin`, if there is one.

    Raises:
        ValueError: The plug-in fails, or `bootstrap.sources` names a source that neither bpo nor it has.
    """
    load_plugin_file(options.plugin, "bootstrap.plugin")
    known = (*SOURCES, *REGISTERED)
    for source in options.sources:
        if source not in known:
            raise ValueError(
                f"bootstrap.sources: {source!r} is none of {', '.join(known)}; correct it, or register it in "
                f"{options.plugin}"
            )
