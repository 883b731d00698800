"""Reads `rank.options` into the dataclass of a judge."""

from __future__ import annotations

from typing import TypeVar

from bpo.config.entry import read_entry
from bpo.config.options import Section
from bpo.config.training import Config

SectionType = TypeVar("SectionType", bound=Section)


def judge_options(kind: type[SectionType], config: Config) -> SectionType:
    """The options of a judge as its dataclass: a `Section` with `where = "rank.options"`.

    Raises:
        ValueError: An option is unknown, has the wrong type or is out of range; names the closest known one.
    """
    return read_entry(kind, config.rank.options, f"the judge {config.rank.judge}", lambda key: "rank.options")
