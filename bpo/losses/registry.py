"""Registers losses and rules that weigh pairs, for the package and for plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bpo.losses.values import PairValues

PairLoss = Callable[[PairValues], torch.Tensor]


class LossState(Protocol):
    """What a stateful loss keeps between steps; part of every checkpoint, the same on all ranks.

    `collect` gives the numbers [P, C] that a micro-batch contributes; after the step, `update` receives those of all
    ranks in an order that does not depend on how the step was divided. If it has an attribute `total_steps`, that is
    set to the number of steps of the run before the first.
    """

    def collect(self, values: PairValues) -> torch.Tensor: ...

    def update(self, rows: list[list[float]]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class LossDefinition:
    """A registered loss; see `register_loss`."""

    name: str
    function: PairLoss
    reference: bool = True
    pairs: str = "text"
    length: str = "sum"
    across_groups: bool = False
    needs_similarity: bool = False
    smoothing: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    state: Callable[[Mapping[str, Any]], LossState] | None = None
    kernel: bool = False
    extrapolates: bool = False


LOSSES: dict[str, LossDefinition] = {}


def register_loss(
    name: str,
    *,
    reference: bool = True,
    pairs: str = "text",
    length: str = "sum",
    across_groups: bool = False,
    needs_similarity: bool = False,
    smoothing: bool = False,
    options: Mapping[str, Any] | None = None,
    state: Callable[[Mapping[str, Any]], LossState] | None = None,
    kernel: bool = False,
    extrapolates: bool = False,
) -> Callable[[PairLoss], PairLoss]:
    """Registers a function from `PairValues` to a loss per pair [P] under its `loss.type` name.

    Args:
        reference: Whether it uses the reference's log-probs. If no term does, none are computed.
        pairs: Rule of its pairs unless `loss.terms[].pairs` names another.
        length: `sum` or `mean`: how a sequence counts unless `loss.terms[].length` says otherwise.
        across_groups: It couples pairs of different groups. It receives all pairs of the step, of all ranks, at once.
        needs_similarity: It reads `PairValues.similarity_PP`.
        smoothing: Whether it has label smoothing.
        options: Its own options with their defaults.
        state: Of a stateful loss: makes its state from the options.
        kernel: `bpo_kernels` computes it under the same name together with the LM head.
        extrapolates: It reads `PairValues.extrapolated_P`, of its option `extrapolation`.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: PairLoss) -> PairLoss:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is already registered")
        LOSSES[name] = LossDefinition(
            name,
            function,
            reference,
            pairs,
            length,
            across_groups,
            needs_similarity,
            smoothing,
            dict(options or {}),
            state,
            kernel,
            extrapolates,
        )
        return function

    return add


@dataclass(frozen=True, slots=True)
class WeighingInputs:
    """What a rule that weighs pairs may read, detached. Shape letter: P pairs.

    chosen_mean_P, rejected_mean_P: mean over the tokens of log pi(y_t).
    chosen_aligned_P, rejected_aligned_P: mean over the tokens of log pi(y_t) - log sum_v pi(v)^2.
    """

    chosen_mean_P: torch.Tensor
    rejected_mean_P: torch.Tensor
    chosen_aligned_P: torch.Tensor
    rejected_aligned_P: torch.Tensor


Weighing = Callable[[WeighingInputs], torch.Tensor]
WEIGHINGS: dict[str, Weighing] = {}


def register_weighting(name: str) -> Callable[[Weighing], Weighing]:
    """Registers a function from `WeighingInputs` to a weight per pair [P] under its `loss.terms[].weighting` name."""

    def add(function: Weighing) -> Weighing:
        if name in WEIGHINGS:
            raise ValueError(f"a weighting named {name!r} is already registered")
        WEIGHINGS[name] = function
        return function

    return add


@register_weighting("wpo")
def wpo(pair: WeighingInputs) -> torch.Tensor:
    """WPO, arXiv 2406.11827 eq. 4 with sampled alignment: how likely the current policy is to give both answers."""
    return torch.exp(pair.chosen_aligned_P + pair.rejected_aligned_P).clamp(max=1)
