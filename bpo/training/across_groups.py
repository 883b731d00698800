"""Losses that couple the pairs of a step across micro-batches and ranks, exactly.

All ranks exchange the few numbers of each pair and evaluate the loss of the whole step in fp64; its derivatives with
respect to a rank's own log-probs then continue through that rank's graphs. Shape letter: P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bpo.job.collectives import gather_from_ranks
from bpo.losses.program import LossOutput, LossProgram
from bpo.losses.values import PairValues
from bpo.records import GroupBatch
from bpo.training.embeddings import PromptEmbeddings

# Columns of `PairValues`; gradients flow to the first three.
_DIFFERENTIABLE = ("chosen_logp_P", "rejected_logp_P", "chosen_nll_P")
_CONSTANT = ("chosen_reference_P", "rejected_reference_P", "chosen_tokens_P", "rejected_tokens_P", "beta_P")


@dataclass(frozen=True)
class StepPairs:
    """This rank's pairs of a term, by micro-batch.

    values: of each micro-batch, with gradient.
    weights: of the pairs of each micro-batch.
    keys: of each pair the key of its group, under which its embedding is stored.
    """

    values: list[PairValues]
    weights: list[torch.Tensor]
    keys: list[list[str]]

    @classmethod
    def of(cls, program: LossProgram, index: int, outputs: Sequence[tuple[LossOutput, GroupBatch]]) -> StepPairs:
        values, weights, keys = [], [], []
        for output, batch in outputs:
            inputs = batch.loss_inputs
            start = sum(inputs.pairs_of_term[:index])
            own = slice(start, start + inputs.pairs_of_term[index])
            values.append(output.across[index])
            weights.append(inputs.pair_weight_P[own])
            # A filler repeats another rank's group.
            groups = inputs.group_of_pair[own]
            keys.append([] if batch.is_filler else [batch.group_keys[g] for g in groups])
        return cls(values, weights, keys)


@dataclass(frozen=True)
class Coupled:
    """A term across groups, seen from one rank.

    loss: sum over this rank's pairs of pair weight times loss.
    expected: the same for a policy equal to the reference; 0 unless asked for.
    shares: of each micro-batch a scalar whose gradient is that of the whole step's loss through this micro-batch.
    """

    loss: float
    expected: float
    shares: list[torch.Tensor]


def couple(
    pairs: StepPairs, program: LossProgram, index: int, embeddings: PromptEmbeddings | None, rank: int, *, first: bool
) -> Coupled:
    """Evaluates a term across groups for the whole step. Called by all ranks.

    Args:
        rank: This rank.
        first: Whether the value at policy = reference is wanted.
    """
    rows = [
        [*row, weight, key]
        for values, weights, keys in zip(pairs.values, pairs.weights, pairs.keys, strict=True)
        if keys
        for row, weight, key in zip(_rows(values), weights.tolist(), keys, strict=True)
    ]
    everyone = gather_from_ranks(rows)
    flat = [row for of_rank in everyone for row in of_rank]
    before = sum(len(of_rank) for of_rank in everyone[:rank])
    own = slice(before, before + len(rows))
    if not flat:
        return Coupled(0.0, 0.0, [_zero(values) for values in pairs.values])
    columns = torch.tensor([row[:-1] for row in flat], dtype=torch.float64).T
    names = (*_DIFFERENTIABLE, *_CONSTANT)
    leaves = {
        name: column.clone().requires_grad_(name in _DIFFERENTIABLE)
        for name, column in zip(names, columns[:-1], strict=True)
    }
    whole = replace(pairs.values[0], **leaves)
    if program.terms[index].definition.needs_similarity:
        assert embeddings is not None
        whole = replace(whole, similarity_PP=embeddings.similarity([row[-1] for row in flat]))
    function, weight_P = program.terms[index].definition.function, columns[-1]
    loss_P = weight_P * function(whole)
    gradients = torch.autograd.grad(
        loss_P.sum(), [leaves[name] for name in _DIFFERENTIABLE], allow_unused=True, materialize_grads=True
    )
    expected = 0.0
    if first:
        at_reference = replace(
            whole, chosen_logp_P=whole.chosen_reference_P, rejected_logp_P=whole.rejected_reference_P
        )
        expected = float((weight_P * function(at_reference))[own].sum())
    shares = _shares(pairs, [gradient[own] for gradient in gradients])
    return Coupled(float(loss_P[own].detach().sum()), expected, shares)


def _rows(values: PairValues) -> list[list[float]]:
    columns = [getattr(values, name).detach() for name in (*_DIFFERENTIABLE, *_CONSTANT)]
    return torch.stack(columns, dim=1).double().tolist()


def _shares(pairs: StepPairs, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    shares, start = [], 0
    for values, keys in zip(pairs.values, pairs.keys, strict=True):
        share = _zero(values)
        if keys:
            own = slice(start, start + len(keys))
            for name, gradient_P in zip(_DIFFERENTIABLE, gradients, strict=True):
                value_P = getattr(values, name)
                share = share + (gradient_P[own].to(value_P) * value_P).sum()
            start += len(keys)
        shares.append(share)
    return shares


def _zero(values: PairValues) -> torch.Tensor:
    return (values.chosen_logp_P * 0.0).sum()
