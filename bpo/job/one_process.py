"""A torch process group of a single process: collectives copy input to output, and no port is opened.

Gloo listens on a TCP port even for one process.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BACKEND = "bpo_one_process"


class _Done(dist.Work):
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


def _copy(output: torch.Tensor, given: torch.Tensor) -> dist.Work:
    output.view(-1).copy_(given.view(-1))
    return _Done()


class OneProcess(dist.ProcessGroup):
    """The collectives that torch.distributed calls for one process; in each, its own part is the whole."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]

    def getBackendName(self) -> str:  # noqa: N802 torch's name
        return BACKEND

    @property
    def group_name(self) -> Any:
        return dist.distributed_c10d._world.pg_names[self]

    def _in_place(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return _Done()

    def barrier(self, opts: Any = None) -> dist.Work:
        return _Done()

    def _one(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> dist.Work:
        return _copy(output, given)

    def _many(self, outputs: list[torch.Tensor], given: list[torch.Tensor], opts: Any = None) -> dist.Work:
        for output, tensor in zip(outputs, given, strict=True):
            _copy(output, tensor)
        return _Done()

    def _to_lists(self, outputs: list[list[torch.Tensor]], given: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return self._many([output for (output,) in outputs], given)

    def _from_lists(self, outputs: list[torch.Tensor], given: list[list[torch.Tensor]], opts: Any = None) -> dist.Work:
        return self._many(outputs, [tensor for (tensor,) in given])


# Set here because torch's declarations name the arguments of each method differently.
_METHODS = {
    OneProcess._in_place: ("allreduce", "allreduce_coalesced", "broadcast", "reduce"),
    OneProcess._to_lists: ("allgather", "gather"),
    OneProcess._from_lists: ("reduce_scatter", "scatter"),
    # torch 2.13 has new names for the methods that take whole tensors.
    OneProcess._one: ("_allgather_base", "all_gather_single", "_reduce_scatter_base", "reduce_scatter_single"),
    OneProcess._many: (
        "allgather_into_tensor_coalesced",
        "all_gather_single_coalesced",
        "reduce_scatter_tensor_coalesced",
        "reduce_scatter_single_coalesced",
    ),
}
for _method, _names in _METHODS.items():
    for _name in _names:
        setattr(OneProcess, _name, _method)


def register() -> str:
    """Makes the group known to torch; returns the name of its backend."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, lambda *given: OneProcess(), devices=["cpu"])
    return BACKEND
