"""What becomes of bad records: `data.on_bad` and `data.max_bad_share`, for every stage in the same way."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass, field
from typing import Literal

from bpo.config.training import DataConfig
from bpo.formats.problems import Problem, RecordError

logger = logging.getLogger(__name__)


def share(text: str) -> float:
    """A share of records on a command line.

    Raises:
        ArgumentTypeError: It does not lie in [0, 1].
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of records; write a number in [0, 1]")
    return value


class TooManyBadRecords(ValueError):
    """More records are bad than `data.max_bad_share` allows: the wrong folder, the wrong file, or damaged data."""


@dataclass
class BadRecords:
    """Takes the problems of one stage.

    With `on_bad` error the first bad record stops the stage; with quarantine they are listed, up to a ceiling.

    Attributes:
        problems: What was reported, bad records first to last.
    """

    on_bad: Literal["error", "quarantine"] = "error"
    max_bad_share: float = 1.0
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def from_config(cls, data: DataConfig) -> BadRecords:
        return cls(data.on_bad, data.max_bad_share)

    def report(self, problem: Problem) -> None:
        """Takes a bad record.

        Raises:
            RecordError: `on_bad` is error.
        """
        if self.on_bad == "error":
            raise RecordError(problem.code, problem.detail)
        self.problems.append(problem)

    def check_share(
        self, num_records: int, what: str, num_bad: int | None = None, advice: str = "`bpo check` lists them all"
    ) -> None:
        """Stops where too many are bad.

        Args:
            num_records: All records, the bad ones included.
            what: The file, for the message.
            num_bad: Bad records; by default those reported.
            advice: What to do, for the message.

        Raises:
            TooManyBadRecords: Their share is above `max_bad_share`.
        """
        count = len(self.problems) if num_bad is None else num_bad
        if count > self.max_bad_share * num_records:
            first = f"; the first: {self.problems[0].detail}" if self.problems else ""
            raise TooManyBadRecords(
                f"{what}: {count} of {num_records} records are bad, more than data.max_bad_share allows "
                f"({self.max_bad_share:g}){first}; {advice}"
            )
