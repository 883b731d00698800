"""Weights and optimizer state in one safetensors file per rank, readable by any number of ranks.

ZeRO splits flattened parameters into one piece per rank and keeps pieces of many parameters in one flat tensor:

    parameter w     [ rank 0          | rank 1          ]      a fragment is w[start : start + numel] ...
    flat tensor 0   [ ... | fragment of w | ... padding ]      ... at flat[flat_start : flat_start + numel]

The file contains the flat tensors unchanged (fp32 master weights, Adam's two moments) and, in its header, the table of
fragments. A reading rank looks up which files contain the elements it needs: fp32 values are only copied, so the state
is bit for bit the same for any number of ranks and any ZeRO stage. safetensors stores numbers and text only: nothing in
such a file can be executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bpo.checkpoint.files import CheckpointError

MASTER = "master"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Fragment:
    """`numel` elements of a flattened parameter from `start` on, at `flat_start` of flat tensor number `flat`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    numel: int
    flat: int
    flat_start: int


@dataclass
class Shard:
    """One rank's part of the training state.

    Attributes:
        tensors: `KIND.NUMBER` -> flat fp32 tensor, for the kinds of `KINDS` and of copies of the master weights.
        optimizer_step: Number of Adam steps, for its bias correction.
        state: Further state of the run as text, in the file of one rank.
    """

    fragments: list[Fragment]
    optimizer_step: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def is_finite(self) -> bool:
        """Whether no master weight is NaN or infinite; needs no memory of the weights' size."""
        # By fragments: ZeRO-3 leaves the padding between them uninitialised.
        weights = (self.tensors[f"{MASTER}.{f.flat}"].narrow(0, f.flat_start, f.numel) for f in self.fragments)
        largest = [torch.linalg.vector_norm(weight, torch.inf) for weight in weights]
        return not largest or bool(torch.isfinite(torch.stack(largest)).all())

    def to_host(self, buffers: dict[str, torch.Tensor]) -> Shard:
        """A copy in host memory; training may continue when it returns.

        Args:
            buffers: Reused by the caller between saves, so that memory is allocated (on a GPU: pinned) only once.
        """
        for name, tensor in self.tensors.items():
            if name not in buffers or buffers[name].shape != tensor.shape or buffers[name].dtype != tensor.dtype:
                buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffers[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        return replace(self, tensors={name: buffers[name] for name in self.tensors})

    def write(self, path: Path) -> None:
        """Raises OSError or safetensors.SafetensorError if the disk is full or cannot be written."""
        table = [asdict(fragment) for fragment in self.fragments]
        metadata = {"format": "pt", "optimizer_step": str(self.optimizer_step), "fragments": json.dumps(table)}
        if self.state:
            metadata["state"] = self.state
        save_file(self.tensors, path, metadata=metadata)


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class ShardSet:
    """All shards of a checkpoint: any range of any parameter. Headers are read at once, values on demand.

    Attributes:
        state: Further state of the run; empty if there is none.

    Raises:
        CheckpointError: a file has no table of fragments.
    """

    def __init__(self, directory: Path, files: Sequence[str]):
        self.directory, self.state = directory, ""
        self._holders: dict[str, list[tuple[Fragment, Any]]] = {}
        steps = set()
        for name in sorted(files):
            handle = safe_open(str(directory / name), framework="pt")
            metadata = handle.metadata() or {}
            if "fragments" not in metadata:
                raise CheckpointError(f"{directory / name}: no table of fragments; it is not a shard of a checkpoint")
            steps.add(int(metadata["optimizer_step"]))
            self.state = metadata.get("state") or self.state
            for row in json.loads(metadata["fragments"]):
                fragment = Fragment(**{**row, "shape": tuple(row["shape"])})
                self._holders.setdefault(fragment.name, []).append((fragment, handle))
        if len(steps) != 1:
            raise CheckpointError(f"{directory}: its shards are from different optimizer steps: {sorted(steps)}")
        self.optimizer_step = steps.pop()
        for holders in self._holders.values():
            holders.sort(key=lambda pair: pair[0].start)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained parameter, by name."""
        return {name: holders[0][0].shape for name, holders in self._holders.items()}

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a flattened parameter, or of its optimizer state `kind`; fp32.

        Raises:
            CheckpointError: some of them are in no shard.
        """
        pieces, at, end = [], start, start + numel
        for fragment, handle in self._holders.get(name, []):
            if fragment.start <= at < fragment.start + fragment.numel and at < end:
                stop = min(end, fragment.start + fragment.numel)
                shift = fragment.flat_start - fragment.start
                pieces.append(handle.get_slice(f"{kind}.{fragment.flat}")[at + shift : stop + shift])
                at = stop
        if at < end:
            raise CheckpointError(f"{self.directory}: no shard contains elements {at} to {end} of {name}")
        return pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])

    def fill(self, fragments: Sequence[Fragment], flats: dict[str, torch.Tensor]) -> None:
        """Copies the fragments into this process's flat tensors (`KIND.NUMBER`); other elements are unchanged."""
        kinds = dict.fromkeys(name.rpartition(".")[0] for name in flats)
        for fragment in fragments:
            for kind in kinds:
                target = flats[f"{kind}.{fragment.flat}"].narrow(0, fragment.flat_start, fragment.numel)
                target.copy_(self.read(kind, fragment.name, fragment.start, fragment.numel))

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every trained parameter in the dtype of the model, one at a time."""
        for name, shape in self.shapes().items():
            flat = self.read(MASTER, name, 0, torch.Size(shape).numel())
            dtype = getattr(torch, self._holders[name][0][0].dtype)
            yield name, flat.reshape(shape).to(dtype)
