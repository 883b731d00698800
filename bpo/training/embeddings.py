"""Embeddings of prompts for losses that compare prompts: computed once before the first step and stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bpo.config.training import Config
from bpo.engine import TrainingEngine
from bpo.job.signals import StopRequest
from bpo.model.load import ResolvedModel
from bpo.training.measure import TrainingData


class PromptEmbeddings:
    """Unit vectors of prompts by the key of their group."""

    def similarity(self, keys: Sequence[str]) -> torch.Tensor:
        """Cosines [P, P] in fp64."""
        raise NotImplementedError


def fill_embedding_store(
    config: Config, model: ResolvedModel, engine: TrainingEngine, data: TrainingData, stop: StopRequest | None = None
) -> PromptEmbeddings:
    """Computes the missing embeddings; each rank computes its share."""
    raise NotImplementedError
