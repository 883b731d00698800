"""What decoding costs: forward passes and tokens of the model on the image and on each biased view.

Shape letters: B sequences of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

IMAGE = "image"


@dataclass
class BranchCost:
    """Forward passes of one view, counted per sequence of a batch, also for those whose answer has ended.

    Attributes:
        prefills: Passes over a prompt.
        steps: Passes over one new token; one per beam.
        tokens: Tokens of all passes, with padding.
    """

    prefills: int = 0
    steps: int = 0
    tokens: int = 0

    @property
    def passes(self) -> int:
        return self.prefills + self.steps


@dataclass
class DecodingCost:
    """Costs by view, `image` for the true image, and how many answers were chosen among calibrated labels.

    Attributes:
        branches: View -> its passes.
        calibrated: Answers that are the label with the largest calibrated probability.
        uncalibrated: Answers of `calibration` that were decoded plainly: the question has no labels or no image.
    """

    branches: dict[str, BranchCost] = field(default_factory=dict)
    calibrated: int = 0
    uncalibrated: int = 0

    def add(self, branch: str, ids_BT: torch.Tensor) -> None:
        """Counts one forward pass over ids [B, T] under the view `branch`."""
        of_branch = self.branches.setdefault(branch, BranchCost())
        if ids_BT.shape[1] > 1:
            of_branch.prefills += ids_BT.shape[0]
        else:
            of_branch.steps += ids_BT.shape[0]
        of_branch.tokens += ids_BT.numel()

    @contextmanager
    def counting(self, model: Any) -> Iterator[None]:
        """Counts the passes of `model.generate` inside, on the true image."""
        handle = model.register_forward_pre_hook(
            lambda module, args, inputs: self.add(IMAGE, inputs["input_ids"]), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    @property
    def relative(self) -> float | None:
        """Forward passes of all views per pass on the true image; None before any, such as if all answers were kept."""
        image = self.branches.get(IMAGE, BranchCost()).passes
        return sum(cost.passes for cost in self.branches.values()) / image if image else None

    def __str__(self) -> str:
        passes = "no forward passes" if self.relative is None else f"x{self.relative:.1f} forward passes"
        if not self.calibrated + self.uncalibrated:
            return passes
        return f"{passes}; {self.calibrated} answers calibrated, {self.uncalibrated} decoded plainly"

    def to_json(self) -> dict[str, Any]:
        relative = None if self.relative is None else round(self.relative, 3)
        return {"relative_forward_passes": relative, **asdict(self)}
