"""Images are decoded once, on demand, in this process or in workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from bpo.config.training import Config
from bpo.data import encode
from bpo.job.launch import Ranks
from bpo.training.batches import training_batches
from bpo.training.measure import measure_groups
from bpo.training.plan import plan_training
from tests.training.doubles import NUM_GROUPS, EngineWithoutModel


def test_a_step_decodes_each_image_of_its_groups_once_and_only_when_it_is_needed(run: Config, decoded) -> None:
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    assert sum(decoded.values()) == NUM_GROUPS
    decoded.clear()
    expected: Counter[str] = Counter()
    for rank in (0, 1):
        engine: Any = EngineWithoutModel(Ranks(rank, 2, rank))
        (step,) = plan_training(run.train, data, engine.ranks)
        own = [g for micro_batch in step.micro_batches[rank] for g in micro_batch]
        assert not any(step.is_filler[rank]) and len(step.micro_batches[rank]) > 1
        (batches,) = training_batches(run.data, data, [step], None, engine)
        before = sum(decoded.values())
        for k, batch in enumerate(batches):
            before += len(batch.group_ids)
            assert sum(decoded.values()) == before, k  # none of the following micro-batches
        assert len(batches) == k + 1 and batch.image_inputs["pixel_values"].shape[0] == len(batch.group_ids)
        expected.update(image for g in own for image in data.dataset.groups[data.usable[g]].images)
    assert decoded == expected and sum(expected.values()) == 6


def test_worker_processes_decode_and_give_the_same_batches(run: Config, decoded) -> None:
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    engine: Any = EngineWithoutModel()
    steps = plan_training(run.train, data, engine.ranks)
    in_line = [batch for step in training_batches(run.data, data, steps, None, engine) for batch in step]
    decoded.clear()
    run.data.num_workers = 1
    by_workers = [batch for step in training_batches(run.data, data, steps, None, engine) for batch in step]
    assert not decoded  # here, in the process that trains
    assert [batch.group_ids for batch in by_workers] == [batch.group_ids for batch in in_line]
    for batch, other in zip(by_workers, in_line, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), other.tensors(), strict=True))


def test_rows_for_compiled_layers_have_the_lengths_of_the_whole_plan(run: Config) -> None:
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    engine: Any = EngineWithoutModel()
    steps = plan_training(run.train, data, engine.ranks)
    plain = [batch for step in training_batches(run.data, data, steps, None, engine) for batch in step]
    engine.policy = SimpleNamespace(model=SimpleNamespace(num_row_lengths=1))
    padded = [batch for step in training_batches(run.data, data, steps, None, engine) for batch in step]
    rows = [batch.input_ids_T.numel() for batch in padded]
    longest = max(batch.input_ids_T.numel() for batch in plain)
    assert set(rows) == {-(-longest // 64) * 64}
    all_at_once = replace(steps[0], micro_batches=((tuple(range(NUM_GROUPS)),),))
    resumed = training_batches(run.data, data, steps, None, engine, plan=[all_at_once, *steps])
    longest = sum(data.num_tokens)
    assert {batch.input_ids_T.numel() for step in resumed for batch in step} == {-(-longest // 64) * 64}
