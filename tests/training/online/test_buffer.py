"""The replay buffer: first in, first out, and the odds of its draws."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict

from bpo.data.groups import MeasuredGroup
from bpo.training.online.buffer import Negative, ReplayBuffer


def negatives(*records: int) -> list[Negative]:
    measured = MeasuredGroup(9, 1, "ab", images=[[1, 2], None])
    return [Negative(record, 1, f"text {record}", measured) for record in records]


def held(buffer: ReplayBuffer) -> list[tuple[int, int]]:
    return [(negative.record, times) for negative, times in buffer.entries]


def test_the_oldest_make_room() -> None:
    buffer = ReplayBuffer(3)
    buffer.append(negatives(0, 1))
    buffer.draw(1, seed=0)
    buffer.append(negatives(2, 3))
    assert [record for record, _ in held(buffer)] == [1, 2, 3]
    buffer.append(negatives(4, 5, 6, 7))
    assert held(buffer) == [(5, 0), (6, 0), (7, 0)]


def test_odds_are_one_over_one_plus_times_drawn() -> None:
    count = 20_000
    buffer = ReplayBuffer(3, [[negative, times] for negative, times in zip(negatives(0, 1, 2), (0, 1, 4), strict=True)])
    drawn = Counter(negative.record for negative in buffer.draw(count, seed=1))
    total = 1 + 1 / 2 + 1 / 5
    for record, odds in enumerate((1, 1 / 2, 1 / 5)):
        expected = odds / total
        assert abs(drawn[record] / count - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    assert held(buffer) == [(0, drawn[0]), (1, 1 + drawn[1]), (2, 4 + drawn[2])]  # with replacement: more than 3 draws


def test_draws_depend_on_the_seed_and_on_earlier_draws() -> None:
    def draws(*seeds: int) -> list[list[int]]:
        buffer = ReplayBuffer(50)
        buffer.append(negatives(*range(50)))
        return [[negative.record for negative in buffer.draw(20, seed)] for seed in seeds]

    assert draws(3, 4) == draws(3, 4) and draws(3)[0] != draws(4)[0]
    assert draws(3, 3)[0] != draws(3, 3)[1]


def test_negatives_of_a_record_are_removed() -> None:
    buffer = ReplayBuffer(9)
    buffer.append(negatives(1, 2, 1, 3))
    buffer.remove({1})
    assert held(buffer) == [(2, 0), (3, 0)]


def test_a_negative_survives_a_checkpoint() -> None:
    (negative,) = negatives(4)
    assert Negative.from_json(json.loads(json.dumps(asdict(negative)))) == negative
