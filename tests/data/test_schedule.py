"""Property tests of the schedule of a run."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo.data.schedule import epoch_order, plan_balance, plan_steps, split_into_micro_batches
from tests.conftest import FUZZ

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=30)
plans = st.fixed_dictionaries(
    {
        "groups_per_step": st.integers(1, 12),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 99),
        "max_tokens": st.integers(1, 1500),
    }
)
worlds = st.integers(1, 5)


@settings(max_examples=60 * FUZZ, deadline=None)
@given(lengths, plans, worlds)
def test_content_of_a_step_does_not_depend_on_the_number_of_ranks(num_tokens, plan, world_size) -> None:
    alone = plan_steps(num_tokens, world_size=1, **plan)
    spread = plan_steps(num_tokens, world_size=world_size, **plan)
    assert [(s.index, s.epoch, s.groups) for s in spread] == [(s.index, s.epoch, s.groups) for s in alone]
    for step in spread:
        pairs = [
            (group, is_filler)
            for rank, fillers in zip(step.micro_batches, step.is_filler, strict=True)
            for batch, is_filler in zip(rank, fillers, strict=True)
            for group in batch
        ]
        assert sorted(group for group, is_filler in pairs if not is_filler) == sorted(step.groups)
        assert {group for group, is_filler in pairs if is_filler} <= set(step.groups)


@settings(max_examples=60 * FUZZ, deadline=None)
@given(lengths, plans, worlds)
def test_every_epoch_contains_every_group_once(num_tokens, plan, world_size) -> None:
    steps = plan_steps(num_tokens, world_size=world_size, **plan)
    for epoch in range(plan["epochs"]):
        groups = [group for step in steps if step.epoch == epoch for group in step.groups]
        assert sorted(groups) == list(range(len(num_tokens)))
        sizes = [len(step.groups) for step in steps if step.epoch == epoch]
        assert all(size == plan["groups_per_step"] for size in sizes[:-1])


@settings(max_examples=100 * FUZZ, deadline=None)
@given(lengths, worlds, st.integers(1, 1500))
def test_ranks_have_equal_counts_within_the_limit_and_minimal_fillers(num_tokens, world_size, max_tokens) -> None:
    bins = split_into_micro_batches(range(len(num_tokens)), num_tokens, world_size, max_tokens)
    assert len(bins) == world_size
    assert len({len(rank) for rank in bins}) == 1  # ZeRO's collectives match
    for batch in (batch for rank in bins for batch in rank):
        assert len(batch) <= 1 or sum(num_tokens[g] for g in batch) <= max_tokens
    num_bins = world_size * len(bins[0])
    empty = sum(not batch for rank in bins for batch in rank)
    assert empty == max(0, num_bins - len(num_tokens))
    assert empty < world_size  # never a round of forward passes consisting only of fillers


@settings(max_examples=100 * FUZZ, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 5), st.integers(1, 200)), min_size=1, max_size=30), worlds, st.integers(1, 1500)
)
def test_padded_rows_stay_within_the_token_limit(shapes, world_size, max_tokens) -> None:
    """Rows are padded to the longest of the micro-batch, so short groups next to a long one exceed their sum."""
    num_tokens = [rows * length for rows, length in shapes]
    row_tokens = [length for _, length in shapes]
    bins = split_into_micro_batches(range(len(shapes)), num_tokens, world_size, max_tokens, row_tokens=row_tokens)
    assert len({len(rank) for rank in bins}) == 1
    assert sorted(g for rank in bins for batch in rank for g in batch) == list(range(len(shapes)))
    for batch in (batch for rank in bins for batch in rank if len(batch) > 1):
        assert sum(shapes[g][0] for g in batch) * max(row_tokens[g] for g in batch) <= max_tokens


def test_levelling_keeps_padded_rows_within_the_limit() -> None:
    """In this example, a swap would balance the two bins but pad one of them above 112 tokens."""
    shapes = [(2, 16), (2, 20), (4, 6), (3, 6), (4, 10)]
    num_tokens, row_tokens = [rows * length for rows, length in shapes], [length for _, length in shapes]
    padded = split_into_micro_batches(range(5), num_tokens, 2, 112, row_tokens=row_tokens)
    assert padded != split_into_micro_batches(range(5), num_tokens, 2, 112)
    for batch in (batch for rank in padded for batch in rank if len(batch) > 1):
        assert sum(shapes[g][0] for g in batch) * max(row_tokens[g] for g in batch) <= 112


def test_a_group_above_the_limit_uses_one_micro_batch() -> None:
    assert split_into_micro_batches([0], [5000], 1, 100) == [[[0]]]
    assert split_into_micro_batches([0, 1, 2], [5000, 50, 50], 1, 100) == [[[0], [1, 2]]]


def test_micro_batches_are_balanced() -> None:
    num_tokens = [30, 40, 50, 60, 70, 80, 90, 100]
    bins = split_into_micro_batches(range(8), num_tokens, 2, 300)
    assert [sum(num_tokens[g] for g in rank[0]) for rank in bins] == [260, 260]
    assert all(rank[0] == sorted(rank[0]) for rank in bins)  # micro-batches keep the order of the step


def test_seed_and_epoch_decide_the_order() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert epoch_order(20, 3, 1) == epoch_order(20, 3, 1)
    options = {"groups_per_step": 4, "epochs": 2, "world_size": 2, "max_tokens": 50}
    assert plan_steps([10] * 9, seed=5, **options) == plan_steps([10] * 9, seed=5, **options)
    assert plan_steps([10] * 9, seed=5, **options) != plan_steps([10] * 9, seed=6, **options)


def test_max_steps_keeps_the_start_of_the_schedule() -> None:
    options = {"groups_per_step": 2, "epochs": 2, "seed": 0, "world_size": 1, "max_tokens": 50}
    whole = plan_steps([10] * 5, **options)
    assert len(whole) == 6
    assert plan_steps([10] * 5, max_steps=4, **options) == whole[:4]


def test_a_filler_is_the_shortest_group_of_its_step() -> None:
    (step,) = plan_steps([70, 10, 40], groups_per_step=3, epochs=1, seed=0, world_size=4, max_tokens=100)
    fillers = [
        batch
        for rank, flags in zip(step.micro_batches, step.is_filler, strict=True)
        for batch, is_filler in zip(rank, flags, strict=True)
        if is_filler
    ]
    assert fillers == [(1,)]
    assert Counter(flag for rank in step.is_filler for flag in rank) == {False: 3, True: 1}


def test_no_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="no groups to schedule"):
        plan_steps([], groups_per_step=1, epochs=1, seed=0, world_size=1, max_tokens=1)


def realistic_lengths(count: int) -> list[int]:
    """Returns packed lengths of LLaVA-1.5 groups: 576 image tokens, a prompt, 2 to 4 answers of log-normal length."""
    draw = random.Random(0)
    answers = [[min(350, max(30, int(draw.lognormvariate(4.6, 0.5)))) for _ in range(4)] for _ in range(count)]
    return [576 + draw.randint(20, 120) + sum(some[: draw.choice((2, 2, 3, 3, 4))]) for some in answers]


def imbalance(per_rank: list[int]) -> float:
    return max(per_rank) * len(per_rank) / sum(per_rank) - 1


@pytest.mark.parametrize(("groups_per_step", "world_size"), [(16, 2), (64, 8), (128, 8), (256, 32), (1024, 128)])
def test_ranks_carry_the_same_tokens_in_every_step_and_micro_batch(groups_per_step, world_size) -> None:
    """ZeRO-3 synchronises in every layer, so the slowest rank determines the speed."""
    lengths = realistic_lengths(4 * groups_per_step)
    steps = plan_steps(
        lengths, groups_per_step=groups_per_step, epochs=1, seed=0, world_size=world_size, max_tokens=8192
    )
    for step in steps:
        assert not any(map(any, step.is_filler))
        tokens = [[sum(lengths[g] for g in batch) for batch in rank] for rank in step.micro_batches]
        assert imbalance([sum(rank) for rank in tokens]) < 0.002
        for concurrent in zip(*tokens, strict=True):
            assert imbalance(list(concurrent)) < 0.002


def test_200_000_groups_are_scheduled_fast_in_little_memory() -> None:
    """The limits are 30 s of CPU time (a busy machine takes longer) and 1 GB."""

    def plan(count: int) -> int:
        lengths = realistic_lengths(count)
        return len(plan_steps(lengths, groups_per_step=128, epochs=1, seed=0, world_size=16, max_tokens=8192))

    started = time.process_time()
    assert plan(200_000) == 1563
    assert time.process_time() - started < 30
    tracemalloc.start()  # tracing is slow, so use a tenth of the groups
    plan(20_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1e8


def test_balance_is_the_excess_of_the_busiest_rank() -> None:
    """A full step with tokens [100, 30] and [80, 60], and a last step with one group and a filler."""
    num_tokens = [100, 80, 60, 30, 30]
    steps = plan_steps(num_tokens, groups_per_step=4, epochs=1, seed=0, world_size=2, max_tokens=100)
    tokens = [[[sum(num_tokens[g] for g in batch) for batch in rank] for rank in step.micro_batches] for step in steps]
    assert tokens == [[[100, 30], [80, 60]], [[30], [30]]]
    balance = plan_balance(steps, num_tokens)
    assert balance.step_largest == pytest.approx(140 / 135 - 1)
    assert balance.micro_batch_largest == pytest.approx(60 / 45 - 1)
    assert balance.step_mean == pytest.approx((140 + 30) / (135 + 30) - 1)
    assert balance.micro_batch_mean == pytest.approx((100 + 60 + 30) / (90 + 45 + 30) - 1)
