"""Checks of the losses' own options."""

from __future__ import annotations

from typing import Any

import pytest

from bpo.losses.options import integer_option, number_option
from tests.losses.pairs import loss_of, pair_values

REFUSED = [
    ("discopop", {"tau": 0}, "loss.options.tau is 0: use a number that is above 0"),
    ("discopop", {"tau": "small"}, "loss.options.tau is 'small': use a number that is above 0"),
    ("simpo", {"gamma": -0.5}, "loss.options.gamma is -0.5: use a number that is at least 0"),
    ("rpo", {"tau": -1.0}, "loss.options.tau is -1.0: use a number that is above 0"),
    (
        "rpo_diagonal",
        {"diagonal_weight": 1.5},
        "loss.options.diagonal_weight is 1.5: use a number that is at least 0 and",
    ),
    ("spa", {"quantile": 1}, "loss.options.quantile is 1: use a number that is above 0 and below 1"),
    ("spa", {"quantile": 0.0}, "loss.options.quantile is 0.0"),
    ("spa", {"window": 0}, "loss.options.window is 0: use an integer of at least 1"),
    ("spa", {"warmup_steps": -1}, "loss.options.warmup_steps is -1: use an integer of at least 0"),
    ("spa", {"warmup_share": 1.0}, "loss.options.warmup_share is 1.0: use a number that is at least 0 and below 1"),
    ("spa", {"extrapolation": -0.5}, "loss.options.extrapolation is -0.5: use a number that is at least 0"),
    ("spa", {"alpha": 0.6}, "loss.options.alpha is 0.6: use a number that is at least 0 and at most 0.5"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=str)
def test_an_option_out_of_range_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(name, pair_values([-1.0], [-2.0], options=options))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "1"])
def test_only_finite_numbers_count(value: Any) -> None:
    with pytest.raises(ValueError, match="loss.options.x is .*: use a number"):
        number_option({"x": value}, "x")
    assert number_option({"x": 2}, "x", above=0) == 2.0


@pytest.mark.parametrize("value", [1.5, True, "3"])
def test_only_integers_count(value: Any) -> None:
    with pytest.raises(ValueError, match="loss.options.x is .*: use an integer of at least 1"):
        integer_option({"x": value}, "x", at_least=1)
    assert integer_option({"x": 3}, "x", at_least=1) == 3
