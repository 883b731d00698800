"""Figures of margins, with values known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.measure.margins import (
    PairMargins,
    describe,
    figures_by_type,
    half_nats,
    log_mean_probability,
    pair_margins,
    warnings_of,
)
from bpo.bootstrap.measure.report import model_table
from bpo.config.measure import MeasureConfig
from tests.sample_groups import group


def pair(record: int, blind: float, seeing: float = 1.0, kind: str = "swap", change: str = "object") -> PairMargins:
    return PairMargins(record, kind, frozenset([change]), blind, blind / 10, seeing)


def test_the_log_of_a_mean_probability() -> None:
    assert log_mean_probability([math.log(0.5), math.log(0.1)]) == pytest.approx(math.log(0.3))
    assert log_mean_probability([-2000.0, -2000.0]) == pytest.approx(-2000.0)
    # One image under which an answer is likely counts more than several under which it is not.
    assert log_mean_probability([-1.0, *[-50.0] * 7]) == pytest.approx(-1 - math.log(8))


def test_every_pair_of_a_record_with_different_tokens() -> None:
    record = group(
        "a", ("a red cat", 2.0, "gt"), ("a red dog", 1.0, "x"), ("a red  cat", 0.0, "y"), ("two red cats", 0.0, "z")
    )
    values: dict[str, Any] = {
        "answer": [0, 1, 0, 2],
        "tokens": [4, 4, 4, 2],
        "seeing": [-1.0, -3.0, -1.0, -2.5],
        "blind": [[-4.0, -4.0], [-2.0, -2.0], [-4.0, -4.0], [-5.0, -5.0]],
    }
    pairs = list(pair_margins([record, record], [values, {"skipped": "image-missing"}], load_lexicon()))
    assert [(p.type, round(p.blind, 6), round(p.seeing, 6)) for p in pairs] == [
        ("x", 2.0, 2.0),  # blind: the rejected answer is 2 nats more plausible
        ("z", -1.0, 1.5),
        ("y", -2.0, -2.0),  # against the second best, as in training
        ("z", -3.0, -0.5),
    ]
    assert [round(p.image, 6) for p in pairs] == [4.0, 0.5, -4.0, -3.5]
    assert [round(p.blind_per_token, 6) for p in pairs] == [0.5, -1.5, -0.5, -2.0]
    assert [sorted(p.kinds) for p in pairs[:2]] == [["object"], ["count"]]


def test_standard_errors_are_those_of_records_not_of_pairs() -> None:
    """Ten equal pairs of each record are worth one."""
    draw = np.random.default_rng(0)
    values = draw.normal(0.3, 1.0, 400)
    alone = describe(values, np.arange(400), seed=1)
    repeated = describe(np.repeat(values, 10), np.repeat(np.arange(400), 10), seed=1)
    assert alone["mean_se"] == pytest.approx(1 / math.sqrt(400), rel=0.2)
    assert alone["share_above_zero_se"] == pytest.approx(0.5 / math.sqrt(400), rel=0.2)
    assert alone["median_se"] == pytest.approx(math.sqrt(math.pi / 2) / math.sqrt(400), rel=0.3)
    for name in ("mean_se", "share_above_zero_se", "median_se"):
        assert repeated[name] == pytest.approx(alone[name], rel=0.1)


def test_figures_of_each_type_and_change() -> None:
    options = MeasureConfig(wide_margin=5.0)
    pairs = [pair(n, blind=n - 1.5, seeing=4.0 * n - 2, change="count" if n == 3 else "object") for n in range(4)]
    figures = figures_by_type([*pairs, pair(9, -3.0, kind="edit")], options)
    assert list(figures) == ["edit", "swap"]
    swap = figures["swap"]
    assert swap["pairs"] == swap["records"] == 4
    assert swap["blind"]["median"] == 0.0 and swap["blind"]["share_above_zero"] == 0.5
    assert swap["blind"]["by_change"]["count"] | {"median": 1.5, "pairs": 1} == swap["blind"]["by_change"]["count"]
    assert swap["seeing"]["share_below_zero"] == 0.25 and swap["seeing"]["share_wide"] == 0.5  # -2, 2, 6, 10
    assert swap["image"]["median"] == 4.0
    assert swap["blind"]["histogram"] == {"-1.5": 1, "-0.5": 1, "0.5": 1, "1.5": 1}
    head, _, row = model_table(figures).splitlines()
    assert head.split("  ")[0] == "type" and row.startswith("swap") and "+0.00 +-" in row
    assert "25.0%" in row and "50.0%" in row and row.endswith("+4.00")
    assert half_nats([-0.1, 0.0, 0.49, 0.5]) == {"-0.5": 1, "0": 2, "0.5": 1}


def warned(blind: np.ndarray, seeing: float = 1.0) -> list[str]:
    pairs = [pair(n, float(value), seeing) for n, value in enumerate(blind)]
    return warnings_of(figures_by_type(pairs, MeasureConfig()), MeasureConfig())


def test_warnings_beyond_chance_only() -> None:
    draw = np.random.default_rng(3)
    balanced = draw.normal(0.0, 1.0, 200)
    assert warned(balanced) == []
    (away,) = warned(balanced - 1.6, seeing=4.0)
    assert away.startswith("swap: without its image") and "bootstrap.select" in away and "median -1." in away
    (towards,) = warned(balanced + 1.0)
    assert "more plausible" in towards
    few = np.where(np.arange(40) < 27, 1.0, -1.0)  # a share of 0.675 in 40 pairs may be chance
    assert warned(few) == [] and len(warned(np.tile(few, 50))) == 1
    assert "raise measure.records" in warned(balanced[:10])[0]
    assert "more than 10 nats in 100 %" in warned(balanced, seeing=20.0)[0]
    assert "the image does not raise the margin" in warned(balanced, seeing=-1.0)[0]
