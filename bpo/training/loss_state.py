"""What stateful losses observe in a step, and their states in checkpoints."""

from __future__ import annotations

import torch

from bpo.job.collectives import gather_from_ranks
from bpo.losses.program import LossOutput, LossProgram
from bpo.records import GroupBatch


class Observations:
    """The numbers of a step that stateful losses keep; read, and given to the states, only after the step."""

    def __init__(self, program: LossProgram):
        self._program = program
        self._indices = [k for k, term in enumerate(program.terms) if term.name in program.states]
        self._owners: dict[int, list[tuple[str, int]]] = {k: [] for k in self._indices}
        self._observed: dict[int, list[torch.Tensor]] = {k: [] for k in self._indices}

    def add(self, output: LossOutput, batch: GroupBatch) -> None:
        """Adds a micro-batch; fillers repeat groups of other ranks and add nothing."""
        if batch.is_filler:
            return
        inputs = batch.loss_inputs
        for k in self._indices:
            start = sum(inputs.pairs_of_term[:k])
            owners = inputs.group_of_pair[start : start + inputs.pairs_of_term[k]]
            self._owners[k] += [(batch.group_ids[g], p) for p, g in enumerate(owners)]
            self._observed[k].append(output.observed[k].double())

    def _rows(self, term: int) -> list[tuple[str, int, list[float]]]:
        observed = self._observed[term]
        rows = torch.cat(observed).tolist() if observed else []
        return [(*owner, row) for owner, row in zip(self._owners[term], rows, strict=True)]

    def update_states(self) -> None:
        """Gives every state the numbers of all ranks, ordered by group and pair, however the step was divided."""
        for k in self._indices:
            everyone = [row for rank in gather_from_ranks(self._rows(k)) for row in rank]
            ordered = [row for _, _, row in sorted(everyone, key=lambda item: (item[0], item[1]))]
            self._program.states[self._program.terms[k].name].update(ordered)
