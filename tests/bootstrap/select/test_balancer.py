"""Balancing constructed sets: a telling word is balanced away by choice or by weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bpo.bootstrap.select.balancer import Balancer
from bpo.bootstrap.select.differences import NUM_FEATURES, Rows, differences
from bpo.bootstrap.select.weights import project, solve_weights
from bpo.config.measure import MeasureConfig
from bpo.config.select import SelectConfig
from tests.bootstrap.select.sets import share_with, telling_set

MEASURE = MeasureConfig(pairs=2000, quick_pairs=2000)


def balance(records: Any, block: int = 10**6, **options: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    balancer = Balancer(SelectConfig(**options), 0, "weaken", MEASURE)
    weights: list[np.ndarray] = []
    for start in range(0, len(records[0]), block):
        weights += balancer.decide(*(part[start : start + block] for part in records))
    return weights, balancer.report()


def chosen(records: Any, weights: list[np.ndarray]) -> list[str]:
    return [text for of_record, w in zip(records[2], weights, strict=True) for text in np.array(of_record)[w > 0]]


@pytest.mark.parametrize("block", [10**6, 700])
def test_selection_balances_a_telling_word_away(block: int) -> None:
    records = telling_set(2000, 3, preferred=0.2, rejected=0.55)
    weights, report = balance(records, block, candidates=3, balance="selection")
    assert all(w.sum() == 1 and set(w) <= {0, 1} for w in weights)
    assert share_with("zebra", [of_record[0] for of_record in records[2]]) > 0.5
    assert share_with("zebra", chosen(records, weights)) == pytest.approx(0.2, abs=0.05)
    assert report["accuracy"]["before"] > 0.64 and abs(report["accuracy"]["after"] - 0.5) < 0.04
    assert report["imbalance"]["before"] > 1.5 and report["imbalance"]["after"] < 1.1


def test_a_balanced_set_keeps_its_first_candidates() -> None:
    records = telling_set(600, 3, preferred=0.3, rejected=0.3)
    weights, report = balance(records, candidates=3, balance="selection")
    assert np.mean([w[0] for w in weights]) > 0.65  # of many n-grams, some are uneven by chance
    # Removing what is uneven by chance in so small a set makes it a little more even than chance: 0.43 to 0.47.
    assert 0.4 < report["accuracy"]["after"] < 0.52


def test_records_may_be_left_out_up_to_the_share_and_no_more_than_needed() -> None:
    records = telling_set(2000, 1, preferred=0.2, rejected=0.55)
    weights, report = balance(records, 500, balance="selection", max_dropped_share=0.3)
    assert 0.15 < np.mean([w.sum() == 0 for w in weights]) <= 0.3
    assert report["dropped_records"] == sum(w.sum() == 0 for w in weights)
    assert report["accuracy"]["after"] < report["accuracy"]["before"] - 0.08
    even = telling_set(2000, 1, preferred=0.3, rejected=0.3)
    assert balance(even, 500, balance="selection", max_dropped_share=0.3)[1]["dropped_records"] == 0


@pytest.mark.parametrize("block", [10**6, 700])
def test_weights_balance_a_telling_word_away(block: int) -> None:
    records = telling_set(2000, 1, preferred=0.3, rejected=0.6)
    weights, report = balance(records, block, balance="weights")
    flat = np.concatenate(weights)
    kept = flat[flat > 0]
    assert kept.mean() == pytest.approx(1, abs=1e-3) and (flat >= 0).all()
    assert report["effective_share"] == pytest.approx(flat.sum() ** 2 / (len(flat) * (flat**2).sum()), abs=1e-3)
    assert report["pairs"] == len(kept) and report["dropped_pairs"] == len(flat) - len(kept)
    rejected = [texts[0] for texts in records[2]]
    gap = share_with("zebra", rejected) - share_with("zebra", records[1])
    assert abs(share_with("zebra", rejected, flat) - share_with("zebra", records[1], flat)) < 0.25 * gap
    assert report["accuracy"]["before"] > 0.6 and abs(report["accuracy"]["after"] - 0.5) < 0.04


def test_the_effective_size_bounds_the_weights() -> None:
    records = telling_set(1000, 1, preferred=0.05, rejected=0.95)
    flat = np.concatenate(balance(records, balance="weights", min_effective_share=0.8)[0])
    assert flat.sum() ** 2 / (len(flat) * (flat**2).sum()) >= 0.799  # MIN_WEIGHT and rounding
    loose = np.concatenate(balance(records, balance="weights", min_effective_share=0.1)[0])
    assert (loose == 0).mean() > 0.2 and loose[loose > 0].mean() == pytest.approx(1, abs=1e-3)  # 0 is not trained on
    everything = np.concatenate(balance(records, balance="weights", min_effective_share=1.0)[0])
    assert everything == pytest.approx(1)


@pytest.mark.parametrize("mode", ["selection", "weights"])
def test_the_decision_is_the_same_each_time(mode: str) -> None:
    records = telling_set(300, 2, preferred=0.2, rejected=0.6)
    first, second = (balance(records, candidates=2, balance=mode) for _ in range(2))
    assert first[1] == second[1]
    assert all(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_differences_are_counts_of_the_rejected_minus_the_preferred() -> None:
    (same, more) = differences("a red bus", ["a red bus", "a red red bus"])
    assert len(same[0]) == 0
    assert sorted(more[1]) == [1.0, 1.0]  # `red` and `red red`
    rows = Rows.of([same, more])
    assert len(rows) == 2 and rows.dot(np.ones(NUM_FEATURES)).tolist() == [0.0, 2.0]
    assert rows.total(np.array([5.0, 2.0])).sum() == 4 and rows.squares(np.array([0.0, 3.0])).sum() == 6


def test_projection_is_the_nearest_feasible_point() -> None:
    rng = np.random.default_rng(0)
    for bound in (np.inf, 3.0, 0.5):
        point = rng.normal(1, 2, 20)
        near = project(point, bound)
        assert near.min() >= 0 and near.mean() == pytest.approx(1) and ((near - 1) ** 2).sum() <= bound * (1 + 1e-6)
        for _ in range(200):  # no feasible point on the way to another one is nearer
            other = project(rng.normal(1, 2, 20), bound)
            assert (point - near) @ (other - near) <= 1e-6


def test_weights_of_pairs_without_differences_are_1() -> None:
    rows = Rows.of([differences("a", ["a"])[0]] * 4)
    zero = np.zeros(NUM_FEATURES)
    assert solve_weights(rows, zero, zero, zero + 0.1, 0.5) == pytest.approx(1)
