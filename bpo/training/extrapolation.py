"""The policy before its first step, run again in every step for losses that extrapolate from it (SPA).

SPA judges labels by the logits (1 + lambda) h - lambda h_ref of every token (arXiv 2406.04412). With one frozen LM head
for both, h = W x, they are W ((1 + lambda) x - lambda x_ref): the reference's hidden states x_ref [N, D] are enough,
its logits are never computed. Shape letters: N response tokens, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from bpo.config.training import Config
from bpo.engine import TrainingEngine
from bpo.losses.program import LossProgram
from bpo.model.reference.store import other_reference
from bpo.records import GroupBatch
from bpo.training.shadow import ShadowWeights

logger = logging.getLogger(__name__)


def check_extrapolation(config: Config, program: LossProgram, model_config: Any) -> None:
    """Raises ValueError if a term extrapolates, but policy and reference have no common linear LM head, or the
    reference is not the policy before its first step.
    """
    fault = ""
    if config.trainable.language == config.trainable.lm_head == "full":
        fault = "the LM head is trained, but policy and reference need one; set trainable.lm_head: frozen"
    elif getattr(model_config.get_text_config(), "final_logit_softcapping", None):
        fault = "the model caps its logits (final_logit_softcapping), so that they are not linear"
    elif other_reference(config):
        fault = "the reference is train.reference_model, not the policy before its first step; remove it"
    for term in program.terms:
        if term.extrapolation and fault:
            raise ValueError(f"{term.where}.options.extrapolation is {term.extrapolation:g}: {fault}, or set 0")


class InitialPolicy:
    """The weights of the policy before its first step; to be made before a checkpoint is loaded.

    Nothing of it is in checkpoints: each start loads these weights before those of its checkpoint.
    """

    def __init__(self, trainer: TrainingEngine):
        self._trainer, self._weights = trainer, ShadowWeights(trainer)
        logger.info(
            "extrapolation: each micro-batch takes another forward pass without gradient, about a third of its "
            "computation (a quarter with gradient checkpointing); the reference's weights take %.1f MB on each rank",
            self._weights.num_bytes / 1e6,
        )

    def hidden_states(self, batches: Sequence[GroupBatch]) -> list[torch.Tensor]:
        """x_ref [N, D] of each batch, without dropout or gradient. Call on all ranks, before a step's first forward."""
        with self._weights.using():
            return [self._trainer.hidden_states(batch) for batch in batches]


def with_reference_states(
    batches: Iterable[GroupBatch], initial: InitialPolicy | None
) -> Iterator[tuple[GroupBatch, torch.Tensor | None]]:
    """The micro-batches of a step, each with its x_ref; None without an initial policy.

    The weights are exchanged once per step, for which all its micro-batches are loaded.
    """
    if initial is None:
        yield from ((batch, None) for batch in batches)
        return
    loaded = list(batches)
    yield from zip(loaded, initial.hidden_states(loaded), strict=True)
