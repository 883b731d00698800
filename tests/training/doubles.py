"""An engine without a model."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from bpo.config.loss import LossConfig
from bpo.job.launch import Ranks
from bpo.losses.program import HeadOutput, LossProgram
from bpo.records import GroupBatch

NUM_GROUPS = 12
NUM_CELLS = 24  # an accepted and a rejected answer each


class EngineWithoutModel:
    """The engine interface that preparation uses; the log-prob of a token is minus its id."""

    device, dtype = torch.device("cpu"), torch.float32
    program = LossProgram(LossConfig())
    policy = SimpleNamespace(model=None)  # no compiled layers, for which rows would be padded

    def __init__(self, ranks: Ranks = Ranks(0, 1, 0), killed_after: int = 10**9):  # noqa: B008
        self.ranks = ranks
        self.killed_after = killed_after
        self.computed: list[str] = []

    def reference_logp(self, batch: GroupBatch) -> HeadOutput:
        if self.killed_after == 0:
            raise KeyboardInterrupt
        self.killed_after -= 1
        self.computed += batch.group_ids
        return HeadOutput(None, -batch.target_N.float())

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values
