"""Collectives over the ranks of a job, or over a single process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from bpo.job.exits import EXIT_INTERRUPTED, Interrupted, JobError, exit_code_of
from bpo.job.launch import Ranks, pick_device
from bpo.job.rendezvous import named_wait

T = TypeVar("T")


class Collectives(Protocol):
    """The collectives that saving and finding checkpoints use."""

    rank: int
    world_size: int

    def sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all ranks, on every rank."""

    def gather(self, item: T) -> list[T]:
        """Returns every rank's item, a JSON value, in rank order, on every rank."""


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
    """Runs `make` on rank 0 and returns or raises its outcome on every rank, so that all agree on what is on disk.

    Values travel as described in `gather_from_ranks`. Rank 0 raises its error itself, the others one of the same
    message and exit code.

    Raises:
        FirstRankError: rank 0 failed. Interrupted: rank 0 was asked to stop.
    """
    error: Exception | None = None
    outcome: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            outcome = {"value": make()}
        except Exception as raised:  # raised below, on this rank and on all others
            error, outcome = raised, {"error": _describe(raised)}
    content = _to_bytes(outcome)
    size = torch.tensor([len(content)], device=_transport_device())
    with named_wait(_ranks()):
        dist.broadcast(size, 0)
        if dist.get_rank() != 0:
            content = torch.empty(int(size), dtype=torch.uint8)
        content = content.to(size.device)
        dist.broadcast(content, 0)
    if error is not None:
        raise error
    outcome = _from_bytes(content)
    if "error" in outcome:
        raise _as_error(**outcome["error"])
    return outcome["value"]


def gather_from_ranks(item: T) -> list[T]:
    """Returns every rank's item, in rank order.

    Items are JSON values: tuples arrive as lists, keys of objects as strings. Unlike the pickled objects of torch's
    `all_gather_object`, they cannot execute code on the ranks that receive them.
    """
    content = _to_bytes(item)
    size = torch.tensor([len(content)], device=_transport_device())
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    with named_wait(_ranks()):
        dist.all_gather(sizes, size)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=size.device)
        padded[: len(content)] = content
        contents = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(contents, padded)
    return [_from_bytes(content[: int(size)]) for content, size in zip(contents, sizes, strict=True)]


class FirstRankError(JobError):
    """An error of rank 0, raised on another rank."""

    def __init__(self, message: str, exit_code: int, owns_directory: bool):
        super().__init__(message)
        self.exit_code, self.owns_directory = exit_code, owns_directory


def _describe(error: Exception) -> dict[str, Any]:
    code = exit_code_of(error)
    message = str(error) if code is not None else f"rank 0 failed: {type(error).__name__}: {error}"
    return {"message": message, "code": code or 1, "owns_directory": getattr(error, "owns_directory", True)}


def _as_error(message: str, code: int, owns_directory: bool) -> Exception:
    return Interrupted(message) if code == EXIT_INTERRUPTED else FirstRankError(message, code, owns_directory)


def _ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def _transport_device() -> torch.device:
    return pick_device() if dist.get_backend() == "nccl" else torch.device("cpu")


def _to_bytes(value: Any) -> torch.Tensor:
    text = json.dumps(value, separators=(",", ":"))
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _from_bytes(content: torch.Tensor) -> Any:
    return json.loads(content.cpu().numpy().tobytes())


def barrier() -> None:
    with named_wait(_ranks()):
        dist.barrier()


def shut_down() -> None:
    """Leaves the process group, if it was entered; otherwise the launcher may wait for a rank that has exited."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
