"""A weighted list of loss terms, applied to the log-probs of a batch.

Shape letters: N response tokens (with second targets), K cells, P pairs, F pairs of fused terms, T terms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from bpo.config.loss import LossConfig
from bpo.data.cells import CellPlan
from bpo.losses.registry import WEIGHINGS, LossState, WeighingInputs
from bpo.losses.sums import CellSums
from bpo.losses.terms import ANCHORED, Term, cell_plan, resolve_terms
from bpo.losses.values import PairValues
from bpo.records import HeadRequest, LossInputs

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Results of the LM head for one micro-batch; see `LogProbHead` and `PolicyModel`."""

    losses_F: torch.Tensor | None
    logp_N: torch.Tensor
    collision_N: torch.Tensor | None = None
    second_M: torch.Tensor | None = None
    extrapolated_N: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rewards:
    """What metrics report of the pairs start <= p < end, detached; rejected sides are None where pairs have none."""

    start: int
    end: int
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor | None
    chosen_logp_P: torch.Tensor
    rejected_logp_P: torch.Tensor | None
    chosen_nll_P: torch.Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss of a micro-batch. Terms across groups count 0 here: their loss is that of a whole step.

    total: sum over terms and pairs of weights times losses, with gradient.
    term_sums_T: [T] the sum over the pairs of each term of pair weight times loss, detached.
    loss_P: [P] pair weight times loss of every pair, detached.
    rewards: see `LossProgram.main`.
    across: for each term across groups, by index, the values of its pairs, with gradient.
    observed: for each stateful term, by index, what its state collects [P, C].
    logp_N: log-probs of the response tokens, detached.
    """

    total: torch.Tensor
    term_sums_T: torch.Tensor
    loss_P: torch.Tensor
    rewards: Rewards
    across: dict[int, PairValues]
    observed: dict[int, torch.Tensor]
    logp_N: torch.Tensor


class LossProgram:
    """The loss of a run: its terms, what they need, and the state of stateful ones.

    Args:
        seed: From which views are drawn.

    Raises:
        ValueError: see `resolve_terms`; a loss rejects its options.
    """

    def __init__(self, config: LossConfig, seed: int = 0):
        self.config = config
        self.terms: tuple[Term, ...] = resolve_terms(config)
        self.plan: CellPlan = cell_plan(config, self.terms, seed)
        self.states: dict[str, LossState] = {}
        for term in self.terms:
            if term.definition.state is not None:
                self.states[term.name] = _placed(term, term.definition.state, term.values)
            _placed(term, self._evaluate_once, term)

    def _evaluate_once(self, term: Term) -> None:
        """Evaluates a loss on a few pairs, so that an invalid option fails before any long work starts."""
        zero_P = torch.zeros(2)
        values = PairValues(
            zero_P,
            zero_P,
            zero_P,
            zero_P,
            zero_P,
            zero_P + 1,
            zero_P + 1,
            zero_P + term.spec.beta,
            **self._constants(term),
        )
        if term.definition.needs_similarity:
            values = replace(values, similarity_PP=torch.ones(2, 2))
        loss_P = term.definition.function(values)
        if not torch.is_tensor(loss_P) or loss_P.shape != (2,):
            got = f"the shape {tuple(loss_P.shape)}" if torch.is_tensor(loss_P) else f"a {type(loss_P).__name__}"
            raise ValueError(f"{term.definition.name} returned {got} for 2 pairs, not a tensor of shape (2,)")

    @property
    def needs_reference(self) -> bool:
        return self.plan.needs_reference

    @property
    def couples_groups(self) -> bool:
        """Whether some term needs all pairs of a step before any backward pass."""
        return any(term.definition.across_groups for term in self.terms)

    @property
    def needs_similarity(self) -> bool:
        return any(term.definition.needs_similarity for term in self.terms)

    @property
    def extrapolation(self) -> float:
        """lambda of the extrapolated log-probs that some term reads; all such terms agree. 0 if there is none."""
        return max(term.extrapolation for term in self.terms)

    def plan_steps(self, total_steps: int) -> None:
        """Tells states that ask for it the number of steps of the run."""
        for state in self.states.values():
            if hasattr(state, "total_steps"):
                state.total_steps = total_steps

    @property
    def shares_second_tokens(self) -> bool:
        """Whether second targets are the reference's tokens; all terms with such targets agree."""
        return any(term.spec.shared_tokens for term in self.terms)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    @cached_property
    def main(self) -> int:
        """Index of the term whose rewards are reported: the first that compares two answers, or else the first."""
        two_sided = [k for k, term in enumerate(self.terms) if term.spec.pairs not in ANCHORED]
        return two_sided[0] if two_sided else 0

    @property
    def compares_answers(self) -> bool:
        """Whether rewards of a dispreferred side are reported."""
        return self.terms[self.main].spec.pairs not in ANCHORED

    @cached_property
    def in_kernel(self) -> tuple[int, ...]:
        """Indices of the terms that the kernels compute with the head: of one loss, smoothing and length."""
        able = [k for k, term in enumerate(self.terms) if term.fits_kernel]
        if not able or self._needs_statistics:
            return ()
        return tuple(k for k in able if self.terms[k].kernel_options == self.terms[able[0]].kernel_options)

    @property
    def _needs_statistics(self) -> bool:
        return any(term.spec.pairs == "argmax" or term.options.weighting for term in self.terms)

    def request(self, inputs: LossInputs) -> HeadRequest:
        """What the head computes for a batch."""
        if not self.in_kernel:
            collision = any(term.options.weighting for term in self.terms)
            return HeadRequest(collision=collision, extrapolation=self.extrapolation)
        first, ranges = self.terms[self.in_kernel[0]], _ranges(inputs.pairs_of_term)
        kernel = (first.definition.name, first.options.label_smoothing)
        pairs, mean = tuple(ranges[k] for k in self.in_kernel), first.length == "mean"
        return HeadRequest(kernel, pairs, mean, extrapolation=self.extrapolation)

    def apply(self, head: HeadOutput, inputs: LossInputs) -> LossOutput:
        """The loss of a micro-batch from the head's results."""
        sums = CellSums(head.logp_N, inputs)
        total = head.logp_N.new_zeros(())
        losses: list[torch.Tensor] = []
        across: dict[int, PairValues] = {}
        observed: dict[int, torch.Tensor] = {}
        rewards: Rewards | None = None
        fused = _split(head.losses_F, inputs.pairs_of_term, self.in_kernel)
        for k, (term, (start, end)) in enumerate(zip(self.terms, _ranges(inputs.pairs_of_term), strict=True)):
            values = self._values(term, sums, inputs, start, end) if k not in fused or k == self.main else None
            if term.extrapolation and values is not None and head.extrapolated_N is not None:
                beyond = self._values(term, CellSums(head.extrapolated_N, inputs), inputs, start, end)
                values = replace(values, extrapolated_P=beyond.delta_P)
            if k == self.main:
                assert values is not None
                rewards = _rewards(values, start, end, one_sided=term.spec.pairs in ANCHORED)
            if k in fused:
                loss_P = fused[k]
            else:
                assert values is not None
                if term.definition.across_groups:
                    across[k] = values
                    loss_P = torch.zeros_like(values.beta_P)
                else:
                    weight_P = self._pair_weights(term, head, sums, inputs, start, end)
                    loss_P = weight_P * term.definition.function(values)
                if term.name in self.states:
                    observed[k] = self.states[term.name].collect(_detached(values))
            total = total + term.options.weight * loss_P.sum()
            losses.append(loss_P.detach())
        assert rewards is not None
        term_sums_T = torch.stack([loss_P.sum() for loss_P in losses])
        return LossOutput(total, term_sums_T, torch.cat(losses), rewards, across, observed, head.logp_N.detach())

    def at_reference(self, head: HeadOutput, inputs: LossInputs) -> LossOutput:
        """The output of a policy equal to the reference; where the reference has no log-probs, of the policy itself."""
        assert inputs.reference is not None
        logp_N = inputs.reference
        if inputs.has_reference_N is not None:
            logp_N = torch.where(inputs.has_reference_N, logp_N, head.logp_N.detach())
        return self.apply(HeadOutput(None, logp_N, head.collision_N), inputs)

    def _constants(self, term: Term) -> dict[str, Any]:
        return {
            "label_smoothing": term.options.label_smoothing,
            "divergence": term.options.divergence,
            "divergence_alpha": term.options.divergence_alpha,
            "options": term.values,
            "state": self.states.get(term.name),
        }

    def _values(self, term: Term, sums: CellSums, inputs: LossInputs, start: int, end: int) -> PairValues:
        pairs_P2, mean = inputs.pairs_P2[start:end], term.length == "mean"
        if term.spec.weighs_tokens:
            logp_P2, reference_P2 = sums.weighed(self.terms.index(term), start, end, mean)
        else:
            logp_P2, reference_P2 = sums.plain(pairs_P2, mean)
        if term.options.guidance != 1:
            assert inputs.guidance_P2 is not None
            guiding_P2, _ = sums.plain(inputs.guidance_P2[start:end], mean)
            g = term.options.guidance
            # V-DPO, arXiv 2411.02712: the policy's log-prob is extrapolated; the guiding pass is a constant.
            logp_P2 = g * logp_P2 - (g - 1) * guiding_P2.detach()
        if not term.definition.reference:
            reference_P2 = torch.zeros_like(logp_P2)
        tokens_P2 = sums.tokens(pairs_P2)
        return PairValues(
            chosen_logp_P=logp_P2[:, 0],
            rejected_logp_P=logp_P2[:, 1],
            chosen_reference_P=reference_P2[:, 0],
            rejected_reference_P=reference_P2[:, 1],
            chosen_nll_P=sums.nll(pairs_P2[:, 0]),
            chosen_tokens_P=tokens_P2[:, 0],
            rejected_tokens_P=tokens_P2[:, 1],
            beta_P=inputs.pair_beta_P[start:end],
            **self._constants(term),
        )

    def _pair_weights(
        self, term: Term, head: HeadOutput, sums: CellSums, inputs: LossInputs, start: int, end: int
    ) -> torch.Tensor:
        """The weights of a term's pairs in the data, times those of its rule."""
        weight_P, pairs_P2 = inputs.pair_weight_P[start:end], inputs.pairs_P2[start:end]
        if not term.options.weighting:
            return weight_P
        assert head.collision_N is not None
        mean_P2, _ = sums.plain(pairs_P2, mean=True)
        collision_P2, _ = CellSums(_with_second(head.collision_N, inputs), inputs).plain(pairs_P2, mean=True)
        aligned_P2 = mean_P2 - collision_P2
        rule = WEIGHINGS[term.options.weighting]
        return weight_P * rule(WeighingInputs(*mean_P2.detach().unbind(1), *aligned_P2.detach().unbind(1))).detach()


def _placed(term: Term, call: Callable[[Any], Made], argument: Any) -> Made:
    """The result of a call that may refuse options of a term; the message then names their place."""
    try:
        return call(argument)
    except ValueError as error:
        own = rf"{term.where}."
        message = re.sub(r"\bloss\.(?:terms\[\]\.)?(?=(?:options|label_smoothing|divergence)\b)", own, str(error))
        raise ValueError(message if own in message else f"{term.where}: {message}") from error


def _with_second(collision_N: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """Second targets are scored by the distributions of their base rows."""
    return collision_N if inputs.second is None else torch.cat([collision_N, collision_N[inputs.second.base_M]])


def _ranges(counts: Sequence[int]) -> list[tuple[int, int]]:
    ends = [sum(counts[: k + 1]) for k in range(len(counts))]
    return [(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _split(losses_F: torch.Tensor | None, counts: Sequence[int], terms: Sequence[int]) -> dict[int, torch.Tensor]:
    if losses_F is None:
        return {}
    return dict(zip(terms, losses_F.split([counts[k] for k in terms]), strict=True))


def _rewards(values: PairValues, start: int, end: int, *, one_sided: bool) -> Rewards:
    values = _detached(values)
    return Rewards(
        start,
        end,
        values.beta_P * values.chosen_ratio_P,
        None if one_sided else values.beta_P * values.rejected_ratio_P,
        values.chosen_logp_P,
        None if one_sided else values.rejected_logp_P,
        values.chosen_nll_P,
    )


def _detached(values: PairValues) -> PairValues:
    tensors = {n: getattr(values, n).detach() for n in PairValues.__slots__ if torch.is_tensor(getattr(values, n))}
    return replace(values, **tensors)


def check_loss(config: LossConfig) -> None:
    """Raises ValueError for an unknown name or an option that does not apply, before any long work starts."""
    LossProgram(config)
