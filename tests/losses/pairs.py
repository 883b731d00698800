"""Pairs by their log-probs, for the tests of losses. Shape letter: P pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import bpo.losses.absolute
import bpo.losses.across
import bpo.losses.preference
import bpo.losses.reference_free
import bpo.losses.stateful  # noqa: F401
from bpo.losses.registry import LOSSES
from bpo.losses.values import PairValues

Numbers = Sequence[float] | Tensor


def pair_values(
    chosen: Numbers,
    rejected: Numbers,
    chosen_reference: Numbers | None = None,
    rejected_reference: Numbers | None = None,
    *,
    beta: float | Sequence[float] = 0.5,
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> PairValues:
    """Values of pairs with the given log pi(y_w) and log pi(y_l), with gradient; a reference of None is 0."""
    chosen_P, rejected_P = leaf(chosen, dtype), leaf(rejected, dtype)
    zeros_P, ones_P = torch.zeros_like(chosen_P), torch.ones_like(chosen_P)
    return PairValues(
        chosen_logp_P=chosen_P,
        rejected_logp_P=rejected_P,
        chosen_reference_P=zeros_P if chosen_reference is None else torch.as_tensor(chosen_reference, dtype=dtype),
        rejected_reference_P=zeros_P
        if rejected_reference is None
        else torch.as_tensor(rejected_reference, dtype=dtype),
        chosen_nll_P=-chosen_P,
        chosen_tokens_P=ones_P,
        rejected_tokens_P=ones_P,
        beta_P=torch.as_tensor(beta, dtype=dtype) * torch.ones_like(chosen_P).detach(),
        **fields,
    )


def leaf(numbers: Numbers, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(numbers, dtype=dtype).detach().clone().requires_grad_()


def loss_of(name: str, values: PairValues) -> Tensor:
    """Loss [P] of the registered name; the options are its defaults unless the values bring some."""
    return LOSSES[name].function(with_defaults(name, values))


def with_defaults(name: str, values: PairValues) -> PairValues:
    """Values with the loss's default options under theirs, and a new state if it has one and they have none."""
    definition = LOSSES[name]
    options = {**definition.options, **values.options}
    state = values.state if values.state is not None or definition.state is None else definition.state(options)
    return replace(values, options=options, state=state)


def gradients(name: str, values: PairValues) -> tuple[list[float], list[float]]:
    """Gradients of the sum of the loss by log pi(y_w) and by log pi(y_l), each [P]."""
    total = loss_of(name, values).sum()
    sides = (values.chosen_logp_P, values.rejected_logp_P)
    found = torch.autograd.grad(total, sides, allow_unused=True)
    chosen, rejected = [side.new_zeros(len(side)) if g is None else g for g, side in zip(found, sides, strict=True)]
    return chosen.tolist(), rejected.tolist()
