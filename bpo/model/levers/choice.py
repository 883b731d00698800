"""What was selected for one option, and why."""

from __future__ import annotations

from typing import NamedTuple


class Lever(NamedTuple):
    """The selected value of an option, and the reason for the log."""

    value: str
    reason: str
