"""Adds LoRA to the base weights in fp32, one layer at a time, and rounds the sum to the data type of the export.

Base weights are on the grid of their data type. A change below half its spacing vanishes when the sum is rounded to
nearest, which is how a merged model can answer like the base. Stochastic rounding keeps it, with more noise:
benchmarks/merge_rounding.py measures from which size of change it is worth it.

Shape letters: O output features, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bpo.job.seeds import derive_seed

# Bits of the significand with the leading one, and the exponent of the smallest normal number, as `frexp` counts it.
_FORMATS = {torch.bfloat16: (8, -125), torch.float16: (11, -13), torch.float32: (24, -125)}
_A, _B, _M = ".lora_A.default.weight", ".lora_B.default.weight", ".lora_magnitude_vector.default.weight"


@dataclass
class WeightChange:
    """What rounding did to the training's change of the weights, summed over tensors.

    Attributes:
        change: Sum of squares of (trained - base), in the precision of the sum.
        kept: Sum of (written - base) * (trained - base).
        error: Sum of squares of (written - trained).
        unchanged: Number of weights that training changed and the file does not.
        numel: Number of weights that training changed.
        worst: Name of the tensor that keeps the smallest fraction, and the fraction.
    """

    change: float = 0.0
    kept: float = 0.0
    error: float = 0.0
    unchanged: int = 0
    numel: int = 0
    worst: tuple[str, float] = field(default=("", 1.0))

    def add(self, name: str, base: torch.Tensor, trained: torch.Tensor, written: torch.Tensor) -> None:
        """Adds a tensor; `trained` is exact, in fp32 or fp64."""
        base, written = base.to(trained.dtype), written.to(trained.dtype)
        change, moved = trained - base, written - base
        squares = float((change * change).sum(dtype=torch.float64))
        kept = float((moved * change).sum(dtype=torch.float64))
        self.change += squares
        self.kept += kept
        self.error += float(((moved - change) ** 2).sum(dtype=torch.float64))
        self.unchanged += int(((moved == 0) & (change != 0)).sum())
        self.numel += int((change != 0).sum())
        if squares and kept / squares < self.worst[1]:
            self.worst = (name, kept / squares)

    def to_json(self) -> dict[str, Any]:
        """`survived` is the projection of what was written on the training's change; null if there is no change."""
        return {
            "survived": self.kept / self.change if self.change else None,
            "relative_error": (self.error / self.change) ** 0.5 if self.change else None,
            "unchanged_share": self.unchanged / self.numel if self.numel else None,
            "rms_change": (self.change / self.numel) ** 0.5 if self.numel else 0.0,
            "worst_tensor": self.worst[0],
            "worst_survived": self.worst[1],
        }


def _spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at fp64 `values`."""
    bits, smallest = _FORMATS[dtype]
    exponent = torch.frexp(values).exponent.clamp(min=smallest) - bits
    return torch.ldexp(torch.ones_like(values), exponent)


def round_nearest(weight_OI: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    return weight_OI.to(dtype)


def round_stochastic(weight_OI: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Rounds up with the probability of the remainder, so that the expectation is the exact value.

    The random numbers depend only on `name`, so that an export is repeatable.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, name, "rounding"))
    exact = weight_OI.double()
    spacing = _spacing(exact, dtype)
    noise = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    return (torch.floor(exact / spacing + noise) * spacing).to(dtype)


Rounding = Callable[[torch.Tensor, torch.dtype, str], torch.Tensor]
ROUNDINGS: dict[str, Rounding] = {"nearest": round_nearest, "stochastic": round_stochastic}


def adapted_layers(
    state: dict[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yields the name of each adapted weight with its A [R, I], B [O, R] and DoRA's norms [O], from a checkpoint."""
    for name, a_RI in state.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            yield f"{layer}.weight", a_RI, state[layer + _B], state.get(layer + _M)


@torch.no_grad()
def merge_into(
    model: torch.nn.Module, state: dict[str, torch.Tensor], *, scale: float, dtype: torch.dtype, rounding: str
) -> WeightChange:
    """Puts the trained parameters into the base `model` and casts its weights to `dtype`, in place.

    Adapted weights become round(W + scale * B A), the sum in fp32, with the rows scaled to the trained norms if it is
    DoRA (arXiv 2402.09353, eq. 5); fully trained parameters are cast. Parameters that transformers keeps in another
    data type than the model's are left there.

    Args:
        state: Trained parameters by name, as in a checkpoint.
        scale: `LoraConfig.scale` of the adapter.
        rounding: A key of `ROUNDINGS`.

    Returns:
        The fate of the change of the adapted weights; without an adapter, of all trained parameters.
    """
    adapted = {name: (a_RI, b_OR, norm_O) for name, a_RI, b_OR, norm_O in adapted_layers(state)}
    fate = WeightChange()
    loaded_as = model.dtype
    for name, parameter in model.named_parameters():
        target = dtype if parameter.dtype == loaded_as else parameter.dtype
        if name in adapted:
            a_RI, b_OR, norm_O = adapted[name]
            exact = parameter.float() + scale * (b_OR.float() @ a_RI.float())
            if norm_O is not None:
                exact *= (norm_O.float() / exact.norm(dim=1))[:, None]
            written = ROUNDINGS[rounding](exact, target, name)
            fate.add(name, parameter, exact, written)
        elif name in state:
            written = state[name].to(target)
            if not adapted:
                fate.add(name, parameter, state[name].float(), written)
        else:
            written = parameter.to(target)
        parameter.data = written
    return fate
