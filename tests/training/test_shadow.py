"""Weights apart from the policy's: the average in closed form, and what the model has in between and afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.training import shadow
from bpo.training.shadow import ShadowWeights


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer of two flat tensors; `published` has the values that its model was given."""
    monkeypatch.setattr(shadow, "_EXCHANGED_AT_ONCE", 3)  # elements, so that they are exchanged in several pieces
    made = SimpleNamespace(master_weights=[torch.randn(7), torch.randn(2)], published=[])
    made.publish_master_weights = lambda: made.published.append([flat.clone() for flat in made.master_weights])
    return made


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.992])
def test_the_average_of_a_constant_policy_has_a_closed_form(trainer: Any, decay: float) -> None:
    """ema_n = b^n ema_0 + (1 - b^n) theta."""
    first = [flat.clone() for flat in trainer.master_weights]
    average = ShadowWeights(trainer)
    for flat in trainer.master_weights:
        flat.normal_()
    for n in range(1, 6):
        average.update(decay)
        for own, start, policy in zip(average.flats, first, trainer.master_weights, strict=True):
            torch.testing.assert_close(own, decay**n * start + (1 - decay**n) * policy)


def test_the_model_has_the_other_weights_within_the_context_and_exactly_its_own_after_it(trainer: Any) -> None:
    other = ShadowWeights(trainer)
    for flat in other.flats:
        flat.normal_()
    policy, values = ([flat.clone() for flat in flats] for flats in (trainer.master_weights, other.flats))
    with pytest.raises(KeyError), other.using():
        raise KeyError
    for given, expected in zip(trainer.published, (values, policy), strict=True):
        assert all(map(torch.equal, given, expected))
    assert all(map(torch.equal, trainer.master_weights, policy)) and all(map(torch.equal, other.flats, values))


def test_copies_are_of_the_policy_or_of_other_weights(trainer: Any) -> None:
    one, two = ShadowWeights(trainer), ShadowWeights(trainer)
    assert one.num_bytes == 9 * 4
    trainer.master_weights[0].add_(1)
    one.copy()
    assert torch.equal(one.flats[0], trainer.master_weights[0]) and not torch.equal(two.flats[0], one.flats[0])
    two.copy(one)
    trainer.master_weights[0].add_(1)
    assert torch.equal(two.flats[0], one.flats[0]) and not torch.equal(two.flats[0], trainer.master_weights[0])
