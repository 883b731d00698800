"""Ranges of options: `number(2e-6, above=0)` and `needed("runs")` declare them, `Section` checks them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

# More than this is a typing error, and would overflow where libraries count in 32 bits or wait.
LARGEST_COUNT, LARGEST_TIME_S = 10**9, 1e9
# What torch, NumPy and Python all accept.
NUM_SEEDS = 2**63


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may have: an interval, and possibly 0, with its meaning."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    zero: str = ""

    def __contains__(self, value: float) -> bool:
        return (self.zero != "" and value == 0) or (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if low is not None and high is not None:
            text = f"in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"
        elif self.above is not None:
            text = "positive" if self.above == 0 else f"above {self.above:g}"
        elif self.at_least == 0:
            return f"0 ({self.zero}) or more" if self.zero else "0 or more"
        else:
            text = f"at least {self.at_least:g}"
        return f"0 ({self.zero}) or {text}" if self.zero else text


def number(default: float | None, **limits: Any) -> Any:
    """A field for a number within limits: the arguments of `Range`."""
    return field(default=default, metadata={"range": Range(**limits)})


def seconds(default: float, *, at_least: float, zero: str = "") -> Any:
    """A field for a duration."""
    limits = Range(at_least=at_least, zero=zero)
    return field(default=default, metadata={"range": limits, "largest": LARGEST_TIME_S})


def needed(default: str) -> Any:
    """A field for a text that must not be empty."""
    return field(default=default, metadata={"needed": True})


@dataclass(kw_only=True)
class Section:
    """A section of the configuration; checks what holds for each of its options alone."""

    where: ClassVar[str]

    def __post_init__(self) -> None:
        for option in fields(self):
            for name, value in _values(f"{self.where}.{option.name}", getattr(self, option.name)):
                fault = _fault(option, value)
                check(not fault, f"{name} is {value!r}; {fault}")


def _values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The option itself, or its items."""
    if isinstance(value, dict):
        yield from ((f"{name}.{key}", item) for key, item in value.items())
    elif isinstance(value, list):
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
    else:
        yield name, value


def _fault(option: Field[Any], value: Any) -> str:
    """Why the option may not have this value; empty if it may."""
    if value is None:
        return "" if option.default is None else "give it a value, or remove the line for the default"
    if isinstance(value, str):
        # Texts whose default is empty may be; items of a list may not.
        if not value.strip() and option.metadata.get("needed", not isinstance(option.default, str)):
            return "it must not be empty"
        return "it contains a zero character" if "\0" in value else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not abs(value) <= sys.float_info.max:  # also false for NaN
        return "it must be a finite number"
    limits = option.metadata.get("range", Range())
    if value not in limits:
        return f"it must be {limits}"
    largest = option.metadata.get("largest", LARGEST_COUNT if isinstance(value, int) else math.inf)
    bounded = limits.below is not None or limits.at_most is not None
    return "" if bounded or value <= largest else f"it must be at most {largest:.0f}"
