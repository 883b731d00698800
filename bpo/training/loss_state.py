"""What stateful losses observe in a step, and their states in checkpoints."""

from __future__ import annotations

from bpo.job.collectives import gather_from_ranks
from bpo.losses.program import LossOutput, LossProgram
from bpo.records import GroupBatch


class Observations:
    """The numbers of a step that stateful losses keep; the states change only after the step."""

    def __init__(self, program: LossProgram):
        self._program = program
        self._indices = [k for k, term in enumerate(program.terms) if term.name in program.states]
        self._rows: dict[int, list[tuple[str, int, list[float]]]] = {k: [] for k in self._indices}

    def add(self, output: LossOutput, batch: GroupBatch) -> None:
        """Adds a micro-batch; fillers repeat groups of other ranks and add nothing."""
        if batch.is_filler:
            return
        inputs = batch.loss_inputs
        for k in self._indices:
            start = sum(inputs.pairs_of_term[:k])
            owners = inputs.group_of_pair[start : start + inputs.pairs_of_term[k]]
            rows = output.observed[k].double().tolist()
            self._rows[k] += [(batch.group_ids[g], p, row) for p, (g, row) in enumerate(zip(owners, rows, strict=True))]

    def update_states(self) -> None:
        """Gives every state the numbers of all ranks, ordered by group and pair, however the step was divided."""
        for k in self._indices:
            everyone = [row for rank in gather_from_ranks(self._rows[k]) for row in rank]
            ordered = [row for _, _, row in sorted(everyone, key=lambda item: (item[0], item[1]))]
            self._program.states[self._program.terms[k].name].update(ordered)
