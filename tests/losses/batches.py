"""Batches of cells with a small LM head, for tests of loss programs. Everything is fp64.

Shape letters: N response tokens (with second targets), K cells, H hidden size, V vocabulary, M second targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bpo.config.loss import LossConfig
from bpo.data.cells import Cell, completion_ids
from bpo.data.encode import EncodedGroup, EncodedPrompt, EncodedView
from bpo.data.pairs import loss_inputs
from bpo.losses.program import HeadOutput, LossOutput, LossProgram
from bpo.model.head import LogProbHead
from bpo.records import LossInputs

HIDDEN, VOCAB = 6, 40
PROMPT = EncodedPrompt("a", (1, 2, 3), {})


def views_of(*names: str) -> tuple[EncodedView, ...]:
    return tuple(EncodedView(name, replace(PROMPT, prefix_ids=(4, 5))) for name in names)


AUXILIARY = EncodedView("auxiliary0", PROMPT, ((30, 31, 32),))
# Three and two answers with views, an auxiliary answer, weights and betas of their own.
GROUPS = (
    EncodedGroup(
        PROMPT,
        ((10, 11, 12), (20,), (11, 21)),
        (1.0, 0.0, 0.0),
        weights=(2.0, 0.5, 1.0),
        betas=(1.0, 0.5, 2.0),
        views=(*views_of("crop", "noise"), AUXILIARY),
    ),
    EncodedGroup(PROMPT, ((13, 14), (23, 24, 25, 26)), (1.0, 0.0), views=(*views_of("crop", "noise"), AUXILIARY)),
)


class Batch:
    """Groups under a loss, with random hidden states of every packed token and random log-probs of a reference.

    Args:
        reference: whether the inputs hold a reference; by default whether the loss needs one.
    """

    def __init__(
        self, loss: LossConfig, groups: Sequence[EncodedGroup] = GROUPS, *, seed: int = 0, reference: bool | None = None
    ):
        generator = torch.Generator().manual_seed(seed)
        self.program = LossProgram(loss)
        cells = [self.program.plan.cells(group) for group in groups]
        inputs, _ = loss_inputs(groups, cells, self.program.plan, is_filler=False)
        packed = [(g, c) for g, one in enumerate(cells) for c in one.cells() if c.argmax_of is None]
        self.cells: list[tuple[int, Cell]] = [*packed, *((g, c) for g, one in enumerate(cells) for c in one.virtual)]
        self.starts: list[int] = inputs.completion_starts_K1.tolist()
        self.target_N = torch.tensor([token for g, cell in packed for token in completion_ids(groups[g], cell)])
        self.hidden_NH = torch.randn(len(self.target_N), HIDDEN, generator=generator, dtype=torch.float64)
        self.hidden_NH.requires_grad_()
        self.head = LogProbHead(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64))
        inputs = in_fp64(inputs)
        if self.program.needs_reference if reference is None else reference:
            reference_N = -4 * torch.rand(self.starts[-1], generator=generator, dtype=torch.float64)
            if inputs.has_reference_N is not None:
                reference_N = reference_N * inputs.has_reference_N
            inputs = replace(inputs, reference=reference_N)
        self.inputs: LossInputs = inputs

    def tokens(self, group: int, cell: Cell) -> slice:
        number = self.cells.index((group, cell))
        return slice(self.starts[number], self.starts[number + 1])

    def head_output(self) -> HeadOutput:
        """What the head computes in training: with the kernels' losses where the program asks for them."""
        request = self.program.request(self.inputs)
        return HeadOutput(*self.head(self.hidden_NH, self.target_N, self.inputs, request))

    def output(self) -> LossOutput:
        return self.program.apply(self.head_output(), self.inputs)

    def general_output(self) -> LossOutput:
        """The same from log-probs, without the kernels' losses."""
        logp_N = self.head(self.hidden_NH, self.target_N)
        return self.program.apply(HeadOutput(None, logp_N), self.inputs)

    def logits(self, group: int, cell: Cell) -> Tensor:
        """[N, V] at the tokens of a packed cell."""
        return self.hidden_NH[self.tokens(group, cell)] @ self.head.weight.T

    def logp(self, group: int, cell: Cell) -> Tensor:
        """log pi [N] of the tokens of a cell, written out."""
        if cell.argmax_of is None:
            target_N = self.target_N[self.tokens(group, cell)]
        else:
            target_N = self.logits(group, Cell(cell.argmax_of, cell.completion)).argmax(1)
        logits_NV = self.logits(group, replace(cell, argmax_of=None))
        return logits_NV.log_softmax(1).gather(1, target_N[:, None])[:, 0]

    def reference(self, group: int, cell: Cell) -> Tensor:
        assert self.inputs.reference is not None
        return self.inputs.reference[self.tokens(group, cell)]

    def ratio(self, group: int, cell: Cell, mean: bool = False) -> Tensor:
        """h of a cell, written out."""
        ratio_N = self.logp(group, cell) - self.reference(group, cell)
        return ratio_N.mean() if mean else ratio_N.sum()

    def gradients(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a loss by the hidden states [N, H] and by the head's weight [V, H]."""
        by_hidden_NH, by_weight_VH = torch.autograd.grad(total, (self.hidden_NH, self.head.weight), retain_graph=True)
        return by_hidden_NH, by_weight_VH

    def assert_same(self, total: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
        """Value and gradients; 1e-6 by default, because betas and weights of pairs are collated in fp32."""
        torch.testing.assert_close(total, expected, rtol=rtol, atol=1e-12)
        for own, other in zip(self.gradients(total), self.gradients(expected), strict=True):
            torch.testing.assert_close(own, other, rtol=rtol, atol=rtol)


def in_fp64(inputs: LossInputs) -> LossInputs:
    """The inputs with fp64 weights, betas and token weights."""
    changed: dict[str, Any] = {
        entry.name: getattr(inputs, entry.name).double()
        for entry in fields(inputs)
        if torch.is_tensor(getattr(inputs, entry.name)) and getattr(inputs, entry.name).is_floating_point()
    }
    if inputs.weighed is not None:
        changed["weighed"] = replace(inputs.weighed, weight_E=inputs.weighed.weight_E.double())
    return replace(inputs, **changed)
