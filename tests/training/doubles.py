"""An engine without a model, and a store without entries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from bpo.job.launch import Ranks
from bpo.records import GroupBatch

NUM_GROUPS = 12


class EngineWithoutModel:
    """The engine interface that preparation uses; the log-prob of a token is minus its id."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, ranks: Ranks = Ranks(0, 1, 0), killed_after: int = 10**9):  # noqa: B008
        self.ranks = ranks
        self.killed_after = killed_after
        self.computed: list[str] = []

    def reference_logp(self, batch: GroupBatch) -> torch.Tensor:
        if self.killed_after == 0:
            raise KeyboardInterrupt
        self.killed_after -= 1
        self.computed += batch.group_ids
        return -batch.target_N.float()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values


NO_STORE: Any = SimpleNamespace(gather=lambda keys: torch.zeros(1))
