"""Patch embeddings of vision towers as one matrix product (`model.patch_embedding`).

A convolution whose stride is its kernel size reads each pixel once: it is a linear layer on patches. PyTorch and cuDNN
select a general convolution for it, which is many times slower for the 3D convolution of Qwen-VL, whose input is
already cut into patches.

Shape letters: I images (or patches, if the input is already cut), C channels, D embedding size.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from bpo.config.training import Config
from bpo.data.families import FAMILIES, Family
from bpo.data.families.qwen import Qwen2VL
from bpo.model.levers.choice import Lever

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel


class _GemmConv(torch.nn.modules.conv._ConvNd):
    """The forward pass of a convolution over patches that do not overlap."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`conv(input, weight, bias, stride=kernel_size)`: [I, C, ...pixels] to [I, D, ...patches]."""
        kernel = self.kernel_size
        grid = [size // edge for size, edge in zip(input.shape[2:], kernel, strict=True)]
        for dim, (count, edge) in enumerate(zip(grid, kernel, strict=True), start=2):
            input = input.narrow(dim, 0, count * edge)  # a convolution ignores incomplete patches, too
        split = input.reshape(*input.shape[:2], *itertools.chain(*zip(grid, kernel, strict=True)))
        # [I, C, grid, edge, grid, edge, ...] to [I, grid, grid, ..., C, edge, edge, ...]: a view for a grid of 1s.
        counts, edges = range(2, split.dim(), 2), range(3, split.dim(), 2)
        patches = split.permute(0, *counts, 1, *edges).flatten(1 + len(grid))
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


class _GemmConv2d(_GemmConv, torch.nn.Conv2d):
    pass


class _GemmConv3d(_GemmConv, torch.nn.Conv3d):
    pass


def _cuts_patches(module: torch.nn.Module) -> bool:
    """Whether the module is a convolution over patches that do not overlap."""
    if type(module) not in (torch.nn.Conv2d, torch.nn.Conv3d):
        return False
    assert isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d)
    unpadded = module.padding == "valid" or not any(module.padding)
    return unpadded and module.stride == module.kernel_size and module.groups == 1 and set(module.dilation) == {1}


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `model.patch_embedding` for this model: `auto` is `gemm` where that moves no pixels."""
    if config.model.patch_embedding != "auto":
        return Lever(config.model.patch_embedding, f"model.patch_embedding is {config.model.patch_embedding}")
    if issubclass(FAMILIES[resolved.config.model_type], Qwen2VL):
        return Lever("gemm", "the tower's input is already cut into patches")
    return Lever("conv", "the tower's input is whole images")


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Installs the selected value in `model`; returns what was changed, for the log.

    Parameters keep their names and shapes.

    Raises:
        ValueError: `gemm`, but the vision tower has no such layer.
    """
    if lever.value == "conv":
        return ""
    changed = []
    for name, module in model.get_submodule(family.vision_module).named_modules():
        if _cuts_patches(module):
            module.__class__ = _GemmConv2d if isinstance(module, torch.nn.Conv2d) else _GemmConv3d
            changed.append(f"{family.vision_module}.{name}")
    if not changed:
        raise ValueError(
            f"model.patch_embedding is {lever.value}, but {family.vision_module} has no convolution over patches that "
            "do not overlap; set it to conv"
        )
    return ", ".join(changed)
