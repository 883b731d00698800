"""Handling of bad records in every stage, as set by `data.on_bad` and `data.max_bad_share`."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass, field
from typing import Literal

from bpo.config.training import DataConfig
from bpo.formats.problems import Problem, RecordError

logger = logging.getLogger(__name__)

MAX_LISTED = 1_000_000  # about 500 MB of problems; a compressed file of a few MB can hold many more bad records


def share(text: str) -> float:
    """Parses a fraction of records given on the command line.

    Raises:
        ArgumentTypeError: The value is not in [0, 1].
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction of records; use a number in [0, 1]")
    return value


class TooManyBadRecords(ValueError):
    """More records are bad than `data.max_bad_share` allows; usually a wrong path or damaged data."""


@dataclass
class BadRecords:
    """Collects the bad records of one stage.

    `on_bad="error"` stops the stage at the first bad record; `"quarantine"` lists them, up to `max_bad_share`.

    Attributes:
        problems: The reported problems, in order.
    """

    on_bad: Literal["error", "quarantine"] = "error"
    max_bad_share: float = 1.0
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def from_config(cls, data: DataConfig) -> BadRecords:
        return cls(data.on_bad, data.max_bad_share)

    def report(self, problem: Problem) -> None:
        """Adds a bad record.

        Raises:
            RecordError: `on_bad` is "error".
            TooManyBadRecords: `MAX_LISTED` are listed already.
        """
        if self.on_bad == "error":
            raise RecordError(problem.code, problem.detail)
        if len(self.problems) >= MAX_LISTED:
            raise TooManyBadRecords(
                f"{problem.where}: more than {MAX_LISTED:,} records are bad; `bpo check` counts them"
            )
        self.problems.append(problem)

    def check_share(
        self, num_records: int, what: str, num_bad: int | None = None, advice: str = "`bpo check` lists them all"
    ) -> None:
        """Checks the fraction of bad records.

        Args:
            num_records: Number of records, including bad ones.
            what: Name of the file in the error message.
            num_bad: Number of bad records (default: those reported).
            advice: Suggested fix in the error message.

        Raises:
            TooManyBadRecords: The fraction exceeds `max_bad_share`.
        """
        count = len(self.problems) if num_bad is None else num_bad
        if count > self.max_bad_share * num_records:
            first = f"; first bad record: {self.problems[0].detail}" if self.problems else ""
            raise TooManyBadRecords(
                f"{what}: {count} of {num_records} records are bad, more than data.max_bad_share allows "
                f"({self.max_bad_share:g}){first}; {advice}"
            )
