"""Decoder layers through torch.compile (`model.compile`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.levers.choice import Lever

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `model.compile` for this model and device."""
    return Lever("none", "not implemented yet")


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Installs the selected value in `model`; returns what was changed, for the log."""
    return ""
