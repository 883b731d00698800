"""Held-out groups: which they are, and the loss on them."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus

from bpo.config.loss import LossConfig
from bpo.config.training import Config
from bpo.data import encode
from bpo.data.groups import MeasuredGroup
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.losses.program import HeadOutput, LossProgram
from bpo.records import GroupBatch
from bpo.training import across_groups, held_out
from bpo.training.held_out import HeldOutLoss, split_held_out
from bpo.training.measure import TrainingData, measure_groups
from bpo.training.reference_pass import fill_reference_store
from tests.training.doubles import EngineWithoutModel
from tests.training.test_reference_pass import no_collectives, resolved

MANY = [f"group {i}" for i in range(400)]


def data_of(ids: list[str]) -> TrainingData:
    dataset: Any = SimpleNamespace(groups=[SimpleNamespace(id=name) for name in ids])
    measured = tuple(MeasuredGroup(1, 1, name) for name in ids)
    return TrainingData(dataset, tuple(range(len(ids))), measured)


def held_ids(ids: list[str], amount: float) -> list[str]:
    kept, held = split_held_out(data_of(ids), amount)
    assert held is not None
    of_both = [part.dataset.groups[index].id for part in (kept, held) for index in part.usable]
    assert sorted(of_both) == sorted(ids)  # none is lost, none on both sides
    assert [group.reference_key for group in held.measured] == of_both[len(kept.usable) :]
    return of_both[len(kept.usable) :]


@pytest.mark.parametrize("amount", [0.1, 40])
def test_held_out_groups_do_not_depend_on_the_order_of_the_file(amount: float) -> None:
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert held_ids(shuffled, amount) == held_ids(MANY, amount)


def test_a_share_stays_the_same_when_groups_are_added() -> None:
    assert 20 <= len(held_ids(MANY, 0.1)) <= 60
    before, after = set(held_ids(MANY[:200], 0.1)), set(held_ids(MANY, 0.1))
    assert before == after & set(MANY[:200])


def test_groups_of_one_record_stay_on_one_side() -> None:
    ids = [form for name in MANY for form in (name, f"{name}#1", f"{name}#2", f"replay:{name}")]
    assert {name.removeprefix("replay:").split("#")[0] for name in held_ids(ids, 0.3)} == set(held_ids(MANY, 0.3))
    assert len(held_ids(ids, 0.3)) == 4 * len(held_ids(MANY, 0.3))


def test_a_number_is_exact_and_zero_holds_out_none() -> None:
    assert len(held_ids(MANY, 40)) == 40
    data = data_of(MANY)
    assert split_held_out(data, 0) == (data, None)


def test_one_part_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out_groups is 400: of 400 usable groups none are left to train on"):
        split_held_out(data_of(MANY), 400)
    with pytest.raises(ValueError, match="held_out_groups is 0.0001: of 3 usable groups none are held out"):
        split_held_out(data_of(MANY[:3]), 1e-4)


class Trained(EngineWithoutModel):
    """The reference's log-prob of a token is minus its id, the policy's three quarters of that."""

    def __init__(self, loss: LossConfig) -> None:
        super().__init__()
        self.program = LossProgram(loss)

    def evaluate(self, batch: GroupBatch, reference_ND: torch.Tensor | None = None) -> HeadOutput:  # noqa: N803
        return HeadOutput(None, -0.75 * batch.target_N.float())


def evaluate(run: Config, loss: LossConfig, stop: StopRequest | None = None) -> tuple[dict[str, float], Trained]:
    engine: Any = Trained(loss)
    run = replace(run, loss=loss)
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    store = fill_reference_store(run, resolved(run), engine, data)
    return HeldOutLoss(run, data, engine, store, None).metrics(stop), engine


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    no_collectives(monkeypatch)
    monkeypatch.setattr(across_groups, "gather_from_ranks", lambda item: [item])
    monkeypatch.setattr(held_out, "gather_from_ranks", lambda item: [item])


def sums_of_ids(run: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of token ids of the accepted and the rejected answer of each group."""
    encoder = encode.load_encoder(run)
    ids = [[sum(encoder.encode_completion(f"{word} {i}")) for i in range(12)] for word in ("yes", "no")]
    chosen, rejected = torch.tensor(ids, dtype=torch.float64)
    return chosen, rejected


@pytest.mark.usefixtures("alone")
def test_loss_and_rewards_are_means_over_all_pairs(run: Config) -> None:
    loss = LossConfig(type="sigmoid", beta=0.01)
    metrics, _ = evaluate(run, loss)
    chosen, rejected = sums_of_ids(run)
    margin = 0.01 * 0.25 * (chosen - rejected)
    assert metrics["loss"] == pytest.approx(float(softplus(-margin).mean()), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(float(margin.mean()), abs=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx(float((margin > 0).double().mean()))


@pytest.mark.usefixtures("alone")
def test_terms_across_groups_compare_the_pairs_of_a_step(run: Config) -> None:
    run.train.groups_per_step = 12
    metrics, _ = evaluate(run, LossConfig(type="aot", beta=0.001))
    chosen, rejected = sums_of_ids(run)
    reference = (rejected - chosen).sort().values
    policy = 0.75 * reference
    expected = softplus(-0.001 * (policy - reference)).mean()
    assert metrics["loss"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.usefixtures("alone")
def test_states_of_losses_are_read_and_not_updated(run: Config) -> None:
    loss = LossConfig(type="bco_pair", beta=0.01)
    metrics, engine = evaluate(run, loss)
    (state,) = engine.program.states.values()
    assert state.state_dict() == LossProgram(loss).states["bco_pair"].state_dict()
    chosen, rejected = (0.01 * 0.25 * side for side in sums_of_ids(run))
    assert metrics["loss"] == pytest.approx(float((softplus(-chosen) + softplus(rejected)).mean()), rel=1e-4)


@pytest.mark.usefixtures("alone")
def test_a_signal_ends_it(run: Config) -> None:
    with StopRequest() as stop:
        stop.received = True
        with pytest.raises(Interrupted):
            evaluate(run, LossConfig(), stop)
