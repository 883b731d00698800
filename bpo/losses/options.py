"""Range checks of options at the first use of a loss, where a value out of range would train something else silently.

Shape letter: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bpo.losses.values import PairValues


def number_option(
    options: Mapping[str, Any],
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """The number `options[name]`.

    Raises:
        ValueError: it is no finite number, or lies outside the bounds.
    """
    value = options[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = is_number and (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        bounds = [
            f"{word} {bound}"
            for word, bound in (("above", above), ("at least", at_least), ("below", below), ("at most", at_most))
            if bound is not None
        ]
        range_text = f" that is {' and '.join(bounds)}" if bounds else ""
        raise ValueError(f"loss.options.{name} is {value!r}: use a number{range_text}")
    return float(value)


def integer_option(options: Mapping[str, Any], name: str, *, at_least: int) -> int:
    """The integer `options[name]`.

    Raises:
        ValueError: it is no integer, or smaller than `at_least`.
    """
    value = options[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"loss.options.{name} is {value!r}: use an integer of at least {at_least}")
    return value


def require_reverse_kl(values: PairValues, name: str) -> None:
    """For a loss that is no function of the difference of both rewards.

    With another divergence, log Z of the prompt cancels in that difference only (arXiv 2309.16240), so that rewards
    on their own, or of different prompts, have no meaning.

    Raises:
        ValueError: the divergence is not `reverse_kl`.
    """
    if values.divergence != "reverse_kl":
        raise ValueError(
            f"loss.terms[].divergence is {values.divergence!r}, but {name} is defined for reverse_kl only: remove the "
            "divergence, or use a loss of the margin such as sigmoid, hinge or ipo"
        )
