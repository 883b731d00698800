"""An interrupted reference pass continues where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config
from bpo.data import encode
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.model.load import ResolvedModel, resolve_model
from bpo.model.reference import format as reference_format
from bpo.model.reference.format import ReferenceStoreError
from bpo.tools.refs import inspect_store
from bpo.training import reference_pass
from bpo.training.batches import training_batches
from bpo.training.measure import measure_groups
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from tests.training.doubles import NUM_CELLS, NUM_GROUPS, EngineWithoutModel


def test_an_interrupted_reference_pass_is_completed(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries computed before the kill are kept; only a changed record is recomputed."""
    no_collectives(monkeypatch)
    monkeypatch.setattr(reference_format, "COMMIT_EVERY_S", 0.0)
    run.train.reference_micro_batch_tokens = 90
    everyone = {f"g{i}" for i in range(NUM_GROUPS)}

    def passed(killed_after: int = 10**9) -> list[str]:
        data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
        engine: Any = EngineWithoutModel(killed_after=killed_after)
        try:
            store = fill_reference_store(run, resolved(run), engine, data)
        except KeyboardInterrupt:
            return engine.computed
        assert len(store) >= NUM_CELLS
        steps = plan_training(run.train, data, engine.ranks)
        for batches in training_batches(run.data, data, steps, store, engine):
            for batch in batches:
                assert batch.loss_inputs.reference is not None
                assert torch.equal(batch.loss_inputs.reference, -batch.target_N.float())
        return engine.computed

    before = passed(killed_after=2)
    after = passed()
    assert len(before) > 2 and sorted(before + after) == sorted(everyone)
    assert passed() == []
    groups = Path(run.data.groups)
    groups.write_text(groups.read_text().replace("yes 7", "certainly 7"))
    assert passed() == ["g7"]
    assert inspect_store(Path(run.train.output_dir) / "reference").num_duplicates == 0  # its other answer has an entry


def test_a_store_of_other_pixel_limits_is_refused(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of image tokens may be of another grid, so tokens and files alone do not tell."""
    no_collectives(monkeypatch)
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    engine: Any = EngineWithoutModel()
    fill_reference_store(run, resolved(run), engine, data)
    run.data.max_pixels = 3136
    with pytest.raises(ReferenceStoreError, match="pixels.*0 to 3136"):
        fill_reference_store(run, resolved(run), engine, data)
    run.data.max_pixels, run.data.image_aspect = 0, "pad"
    with pytest.raises(ReferenceStoreError, match="image_aspect.*pad"):
        fill_reference_store(run, resolved(run), engine, data)


def resolved(run: Config) -> ResolvedModel:
    return resolve_model(run.model, for_training=True)


def no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_pass, "from_rank_0", lambda make: make())
    monkeypatch.setattr(reference_pass, "gather_from_ranks", lambda item: [item])
    monkeypatch.setattr(reference_pass, "barrier", lambda: None)


def test_a_signal_ends_the_reference_pass_after_its_micro_batch(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank received it: this one stops through the sum over ranks, and the work of both is stored."""
    no_collectives(monkeypatch)
    run.train.reference_micro_batch_tokens = 90
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    engine: Any = EngineWithoutModel()
    others = iter([0.0, 0.0, 1.0])
    engine.sum_over_ranks = lambda values: [values[0] + next(others)]
    with StopRequest() as stop, pytest.raises(Interrupted, match="in the reference pass; 6 of 12 groups remain"):
        fill_reference_store(run, resolved(run), engine, data, stop)
    again: Any = EngineWithoutModel()
    with StopRequest() as stop:
        assert len(fill_reference_store(run, resolved(run), again, data, stop)) == NUM_CELLS
    assert len(engine.computed) == 6 and sorted(engine.computed + again.computed) == sorted(
        f"g{i}" for i in range(NUM_GROUPS)
    )
