"""Order of work: fair prefixes, little padding."""

from __future__ import annotations

import numpy as np
import pytest

from bpo.bootstrap.job.order import WINDOW_BATCHES, fair_batches

SIZE = 16


def lengths_of_instructions(count: int, seed: int = 0) -> np.ndarray:
    """Characters of prompt and answer like those of LLaVA-1.5's data: short answers, conversations, descriptions."""
    rng = np.random.default_rng(seed)
    median, spread = np.array([[74.0, 0.35], [148.0, 0.5], [545.0, 0.35]])[rng.choice(3, count, p=[0.4, 0.4, 0.2])].T
    return (10 + median * np.exp(spread * rng.standard_normal(count))).astype(np.int64)


def planned(lengths: np.ndarray, size: int = SIZE, seed: int = 0, **options: int) -> tuple[np.ndarray, np.ndarray]:
    return fair_batches(lengths, np.zeros(len(lengths), np.uint8), size, seed, **options)


@pytest.mark.parametrize("stopped_at", [0.1, 0.3, 0.7])
def test_a_stopped_job_has_finished_a_fair_sample(stopped_at: float) -> None:
    """Shares of objects that depend on the length are within chance of all, over 20 jobs."""
    deviations = []
    for seed in range(20):
        lengths = lengths_of_instructions(12_000, seed)
        has_object = {
            "by length": lengths < np.quantile(lengths, 0.38),
            "more likely in short ones": np.random.default_rng(seed).random(12_000) < np.exp(-lengths / 150),
            "of one length": lengths == lengths[0],
            "any": np.random.default_rng(seed).random(12_000) < 0.1,
        }
        order, starts = planned(lengths, seed=seed)
        done = order[: starts[round(stopped_at * (len(starts) - 1))]]
        for has in has_object.values():
            share = has.mean()
            chance = np.sqrt(share * (1 - share) / len(done) * (1 - len(done) / len(lengths)))
            deviations.append((has[done].mean() - share) / chance)
    assert np.sqrt(np.mean(np.square(deviations))) < 1.3 and np.abs(deviations).max() < 4


def test_padding_is_little() -> None:
    """Padding over content: 6 % in windows, 1 % if everything is sorted, 240 % in random order."""
    lengths = lengths_of_instructions(20_000)

    def padding(order: np.ndarray, starts: np.ndarray) -> float:
        widths = np.repeat(np.maximum.reduceat(lengths[order], starts[:-1]), np.diff(starts))
        return float(widths.sum() / lengths.sum() - 1)

    assert 0.05 < padding(*planned(lengths)) < 0.07
    assert 2.2 < padding(*planned(lengths, window=1)) < 2.6
    assert padding(np.argsort(lengths), np.arange(0, 20_001, SIZE)) < 0.01


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 1000, 2 * SIZE * WINDOW_BATCHES + 5])
def test_each_record_is_in_one_batch_and_the_first_has_the_longest(count: int) -> None:
    lengths = lengths_of_instructions(count)
    order, starts = planned(lengths)
    assert sorted(order.tolist()) == list(range(count))
    sizes = np.diff(starts)
    assert starts[-1] == count and sizes.max() <= SIZE and (sizes < SIZE).sum() <= 1
    assert order[0] == lengths.argmax() and len(starts) - 1 == -(-count // SIZE)


def test_kinds_share_no_batch_and_take_turns() -> None:
    rng = np.random.default_rng(0)
    kinds = (rng.random(5000) < 0.2).astype(np.uint8)
    order, starts = fair_batches(lengths_of_instructions(5000), kinds, SIZE, 0)
    of_batch = [set(kinds[order[first:last]].tolist()) for first, last in zip(starts[:-1], starts[1:], strict=True)]
    assert all(len(found) == 1 for found in of_batch)
    is_rare = np.array([found == {1} for found in of_batch])
    running = np.cumsum(is_rare) - is_rare.mean() * np.arange(1, len(is_rare) + 1)
    assert np.abs(running).max() < 2


def test_batches_are_the_same_each_time_and_another_seed_orders_them_otherwise() -> None:
    lengths = lengths_of_instructions(3000)
    first, again, other = planned(lengths), planned(lengths), planned(lengths, seed=1)
    assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])


def test_nothing_to_do() -> None:
    order, starts = planned(np.zeros(0, np.int64))
    assert len(order) == 0 and starts.tolist() == [0]
