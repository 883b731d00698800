"""Collectives over the ranks of a job, or over a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from bpo.job.launch import Ranks, pick_device

T = TypeVar("T")


class Collectives(Protocol):
    """The collectives that saving and finding checkpoints use."""

    rank: int
    world_size: int

    def sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all ranks, on every rank."""

    def gather(self, item: T) -> list[T]:
        """Returns every rank's item in rank order, on every rank."""


class Alone:
    """The collectives of a single process."""

    rank, world_size = 0, 1

    def sum(self, values: list[float]) -> list[float]:
        return values

    def gather(self, item: T) -> list[T]:
        return [item]


class JobRanks:
    """The collectives of the process group."""

    def __init__(self, ranks: Ranks):
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self._device = pick_device(ranks)

    def sum(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, item: T) -> list[T]:
        return gather_from_ranks(item)


def from_rank_0(make: Callable[[], T]) -> T:
    """Runs `make` on rank 0 and returns or raises its outcome on every rank, so that all agree on what is on disk."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [make(), None]
        except Exception as error:  # raised below, on this rank and on all others
            outcome = [None, error]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_from_ranks(item: T) -> list[T]:
    """Returns every rank's item, in rank order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def barrier() -> None:
    dist.barrier()


def shut_down() -> None:
    """Leaves the process group; otherwise the launcher may wait for a rank that has exited, or warn about it."""
    dist.barrier()
    dist.destroy_process_group()
