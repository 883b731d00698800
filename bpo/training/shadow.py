"""A copy of the trained weights apart from the policy's, such as a moving average, that can take the model's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bpo.engine import TrainingEngine

_EXCHANGED_AT_ONCE = 1 << 26  # elements, 256 MB: exchanging two tensors takes this much further memory


class ShadowWeights:
    """fp32 values of this rank's part of the trained parameters, at first the policy's.

    They mirror the master weights, of which ZeRO gives each rank an equal part: 4 bytes per trained parameter, divided
    by the number of ranks, on the device of the master weights. Frozen weights are shared with the policy.

    Attributes:
        flats: Like `TrainingEngine.master_weights`.
    """

    def __init__(self, trainer: TrainingEngine):
        self._trainer = trainer
        self.flats = [flat.detach().clone() for flat in trainer.master_weights]

    @property
    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.flats)

    @torch.no_grad()
    def copy(self, source: ShadowWeights | None = None) -> None:
        """Takes the values of other weights; None means the policy's."""
        others = self._trainer.master_weights if source is None else source.flats
        for own, other in zip(self.flats, others, strict=True):
            own.copy_(other)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Moves towards the policy: w <- decay w + (1 - decay) policy (SAPO, arXiv 2405.20830)."""
        for own, policy in zip(self.flats, self._trainer.master_weights, strict=True):
            own.lerp_(policy, 1 - decay)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """The model has these weights within the context, and exactly the policy's after it. Call on all ranks.

        Neither a backward pass nor a step may run within it, nor a backward pass of an earlier forward pass.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchanges values with the policy: in place, because DeepSpeed keeps references to the master weights."""
        for own, policy in zip(self.flats, self._trainer.master_weights, strict=True):
            for mine, theirs in zip(own.split(_EXCHANGED_AT_ONCE), policy.split(_EXCHANGED_AT_ONCE), strict=True):
                kept = theirs.clone()
                theirs.copy_(mine)
                mine.copy_(kept)
        self._trainer.publish_master_weights()
