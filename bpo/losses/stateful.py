"""Losses that depend on rewards of earlier steps, kept in a state that is part of every checkpoint.

Within a step the state is constant, so that the loss does not depend on how a step is divided into micro-batches.
States are plain Python numbers in fp64: they pass through JSON unchanged.

Notation of `values.py`; r = beta h; Delta = r(y_w) - r(y_l), or that of another divergence; ls = log sigmoid.
Shape letters: P pairs, C numbers that a pair contributes to the state.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bpo.losses.absolute import rewards
from bpo.losses.options import integer_option, number_option
from bpo.losses.preference import smoothed_logistic
from bpo.losses.registry import register_loss
from bpo.losses.values import PairValues


class MeanReward:
    """Mean of both rewards of all pairs of earlier steps; 0 before the first.

    Rewards that are not finite, of a step that failed, are left out.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.count = 0
        self.mean = 0.0

    def collect(self, values: PairValues) -> Tensor:
        """Rewards of both sides, [P, C = 2]."""
        return torch.stack(rewards(values, "bco_pair"), dim=1).detach()

    def update(self, rows: list[list[float]]) -> None:
        numbers = [number for row in rows for number in row if math.isfinite(number)]
        if numbers:
            # Exactly rounded, hence the same for any order of the rows.
            self.mean = math.fsum([self.count * self.mean, *numbers]) / (self.count + len(numbers))
            self.count += len(numbers)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean = int(state["count"]), float(state["mean"])


@register_loss("bco_pair", state=MeanReward)
def bco_pair(values: PairValues) -> Tensor:
    """-ls(r_w - d) - ls(-(r_l - d)), d the mean of all rewards of earlier steps: BCO, arXiv 2404.04656, for pairs.

    A binary classifier of good and bad answers, d its bias. The first step has d = 0, the mean at the reference.
    """
    assert isinstance(values.state, MeanReward)
    chosen_P, rejected_P = rewards(values, "bco_pair")
    shift = values.state.mean
    return -logsigmoid(chosen_P - shift) - logsigmoid(shift - rejected_P)


def judged_margins(values: PairValues) -> Tensor:
    """SPA's m [P]: the margins Delta, of extrapolated log-probs if its option asks for them; without gradient."""
    margin_P = values.delta_P if values.extrapolated_P is None else values.extrapolated_P
    return margin_P.detach()


class MarginWindow:
    """The last `window` margins m of earlier steps, and the number of these steps.

    Margins that are not finite, of a step that failed, are left out.

    Raises:
        ValueError: an option of `spa` is out of range.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.alpha = number_option(options, "alpha", at_least=0, at_most=0.5)
        self.quantile = number_option(options, "quantile", above=0, below=1)
        self.warmup_steps = integer_option(options, "warmup_steps", at_least=0)
        self.warmup_share = number_option(options, "warmup_share", at_least=0, below=1)
        number_option(options, "extrapolation", at_least=0)
        self.total_steps: int | None = None
        self.margins: deque[float] = deque(maxlen=integer_option(options, "window", at_least=1))
        self.num_steps = 0

    @property
    def threshold(self) -> float | None:
        """Quantile of the margins, interpolated linearly as by `torch.quantile`; None while no label is refined."""
        if not self.margins or self.num_steps < self.warmup_steps or self.num_steps < self._share_of_steps():
            return None
        return torch.quantile(torch.tensor(self.margins, dtype=torch.float64), self.quantile).item()

    def _share_of_steps(self) -> float:
        if not self.warmup_share:
            return 0.0
        assert self.total_steps is not None
        return self.warmup_share * self.total_steps

    def collect(self, values: PairValues) -> Tensor:
        """Margins, [P, C = 1]."""
        return judged_margins(values)[:, None]

    def update(self, rows: list[list[float]]) -> None:
        self.num_steps += 1
        self.margins.extend(margin for (margin,) in rows if math.isfinite(margin))

    def state_dict(self) -> dict[str, Any]:
        return {"margins": list(self.margins), "num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the last `window` margins: the window may be another than that of the run which saved them."""
        self.margins.clear()
        self.margins.extend(float(margin) for margin in state["margins"])
        self.num_steps = int(state["num_steps"])


SPA_OPTIONS = {
    "alpha": 0.1,
    "window": 50,
    "quantile": 0.1,
    "warmup_steps": 0,
    "warmup_share": 0.0,
    "extrapolation": 0.0,
}


@register_loss("spa", options=SPA_OPTIONS, state=MarginWindow, extrapolates=True)
def spa(values: PairValues) -> Tensor:
    """-(1 - a + a s) ls(Delta) - (a - a s) ls(-Delta), s = 1[m > gap]: refined labels of SPA, arXiv 2406.04412.

    A pair whose margin m is among the smallest of recent steps counts as possibly mislabelled: its label is smoothed by
    a. gap is the `quantile` of the last `window` margins m of earlier steps, and s carries no gradient. a = 0, which is
    DPO, during `warmup_steps` steps, the first `warmup_share` of the run's and before the first margin; else `alpha`.

    m = beta [lp(y_w) - lp(y_l) - (log pi_ref(y_w) - log pi_ref(y_l))], where lp is of the logits
    (1 + lambda) policy - lambda reference, lambda = `extrapolation`; with 0, m = Delta.
    """
    assert isinstance(values.state, MarginWindow)
    delta_P = values.delta_P
    gap = values.state.threshold
    if gap is None:
        return smoothed_logistic(delta_P, 0.0)
    doubtful_P = (judged_margins(values) <= gap).to(delta_P)
    return smoothed_logistic(delta_P, values.state.alpha * doubtful_P)
