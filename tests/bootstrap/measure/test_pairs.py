"""Pairs and samples."""

from __future__ import annotations

import random

from bpo.bootstrap.measure.pairs import Sample, sample_rank, typed_pairs
from bpo.records import Completion, ContentPart, PreferenceGroup, Provenance, Turn


def test_the_first_best_completion_is_paired_with_each_worse_one() -> None:
    completions = (
        Completion("worse", 0.0, "swap", Provenance("other-annotation", donor="r2"), weight=0.5),
        Completion("best", 1.0, "gt", weight=2.0),
        Completion("as good", 1.0, "gt"),
        Completion("middle", 0.5, "llm-hal"),
        Completion(" best ", 0.5, "llm-hal"),
    )
    group = PreferenceGroup("r1", ("1.png",), (Turn("user", (ContentPart("text", "?"),)),), completions)
    found = list(typed_pairs(group))
    assert [(kind, pair.preferred, pair.rejected) for kind, pair in found] == [
        ("swap", "best", "worse"),
        ("llm-hal", "best", "middle"),
    ]
    assert found[0][1].donor == "r2" and found[0][1].weight == 1.0 and found[0][1].images == ("1.png",)
    assert found[1][1].donor is None and found[1][1].weight == 2.0


def test_samples_do_not_depend_on_the_order() -> None:
    ids = [f"r{i}" for i in range(500)]
    samples = []
    for seed in range(3):
        random.Random(seed).shuffle(ids)
        sample: Sample[str] = Sample(40)
        for name in ids:
            sample.add(sample_rank(7, name), name, name)
        assert sample.num_seen == 500
        samples.append(sample.values())
    assert samples[0] == samples[1] == samples[2] and len(set(samples[0])) == 40
    assert samples[0] == sorted(ids, key=lambda name: sample_rank(7, name))[:40]
    assert sample.highest_rank == sample_rank(7, samples[0][-1])
    assert samples[0] != sorted(ids, key=lambda name: sample_rank(8, name))[:40]


def test_items_of_one_record_are_told_apart() -> None:
    orders = []
    for ties in (("a", "b", "c"), ("c", "a", "b")):
        sample: Sample[str] = Sample(2)
        for tie in ties:
            sample.add(5, tie, tie)
        orders.append(sample.values())
    assert orders[0] == orders[1] and len(orders[0]) == 2


def test_an_empty_sample() -> None:
    assert Sample[str](3).values() == [] and Sample[str](3).highest_rank == -1
