"""Sums and means over the tokens of cells, and over the tokens of sides of pairs with weights.

Shape letters: N response tokens, K cells, P pairs, E weighed tokens.
"""

from __future__ import annotations

import torch

from bpo.records import LossInputs


class CellSums:
    """Log-probs of cells of the policy and of the reference (0 without one). The index -1 gives 0.

    Args:
        logp_N: of the policy; with gradient. Cells of second targets may be absent: they then have no value.
    """

    def __init__(self, logp_N: torch.Tensor, inputs: LossInputs):
        self.inputs, self.logp_N = inputs, logp_N
        own_N = inputs.completion_of_token_N[: logp_N.numel()]
        policy_K = logp_N.new_zeros(inputs.num_completions).index_add(0, own_N, logp_N)
        self._policy_K = _with_zero(policy_K)
        self._reference_K = None if inputs.reference is None else _with_zero(inputs.sequence_sum(inputs.reference))
        self._tokens_K = _with_zero(inputs.completion_starts_K1.diff().to(logp_N.dtype))

    def plain(self, pairs_P2: torch.Tensor, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi and log pi_ref of both sides, [P, 2] each."""
        logp_P2 = self._policy_K[pairs_P2]
        reference_P2 = torch.zeros_like(logp_P2) if self._reference_K is None else self._reference_K[pairs_P2]
        if mean:
            tokens_P2 = self.tokens(pairs_P2).clamp(min=1)
            return logp_P2 / tokens_P2, reference_P2 / tokens_P2
        return logp_P2, reference_P2

    def weighed(self, term: int, start: int, end: int, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the token weights of a term, whose pairs are start <= p < end."""
        weighed = self.inputs.weighed
        if weighed is None:  # this batch has no pairs with token weights
            return self.plain(self.inputs.pairs_P2[start:end], mean)
        first = sum(weighed.tokens_of_term[:term])
        own = slice(first, first + weighed.tokens_of_term[term])
        token_E, side_E, weight_E = weighed.token_E[own], weighed.side_E[own] - 2 * start, weighed.weight_E[own]

        def side_sum(value_E: torch.Tensor) -> torch.Tensor:
            return value_E.new_zeros(2 * (end - start)).index_add(0, side_E, value_E).view(-1, 2)

        reference = self.inputs.reference
        logp_P2 = side_sum(weight_E * self.logp_N[token_E])
        reference_P2 = torch.zeros_like(logp_P2) if reference is None else side_sum(weight_E * reference[token_E])
        if mean:
            weight_P2 = side_sum(weight_E)
            weight_P2 = weight_P2.where(weight_P2 > 0, 1.0)
            return logp_P2 / weight_P2, reference_P2 / weight_P2
        return logp_P2, reference_P2

    def tokens(self, pairs_P2: torch.Tensor) -> torch.Tensor:
        return self._tokens_K[pairs_P2]

    def nll(self, cells_P: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood per token."""
        return -self._policy_K[cells_P] / self._tokens_K[cells_P].clamp(min=1)


def _with_zero(value_K: torch.Tensor) -> torch.Tensor:
    """Appends a 0, which the index -1 finds."""
    return torch.cat([value_K, value_K.new_zeros(1)])
