"""Loads a checkpoint for inference, without exporting it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from bpo.checkpoint.export import find_checkpoint, read_trained
from bpo.checkpoint.fidelity import trained_change
from bpo.config.adapter import split_adapter
from bpo.config.training import Config, ModelConfig
from bpo.model.load import load_model

logger = logging.getLogger(__name__)


def load_checkpoint(options: ModelConfig, checkpoint: Path, device: torch.device | None = None) -> Any:
    """The base model with the trained parameters of a checkpoint, LoRA apart from the base's weights, in eval mode.

    Args:
        options: `model.*` of the base; its dtype is replaced by that of the training.
        checkpoint: A checkpoint, or a run directory for its latest valid one.

    Raises:
        ValueError: There is no valid checkpoint, or it is of another base model.
    """
    trained = read_trained(Config(model=options), *find_checkpoint(checkpoint))
    model = load_model(split_adapter(trained.config.model)[0], device)
    logger.info("loaded %s", trained.name)
    return trained_change(trained.config, trained.state)(model).to(model.device).eval()
