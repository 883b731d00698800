"""A step's passes without DeepSpeed: a tiny model with an adapter, its micro-batches and an engine for `run_step`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bpo.config.loss import LossConfig
from bpo.config.training import Config, LoraConfig, ModelConfig
from bpo.data.collate import collate_groups
from bpo.engine import TrainingEngine
from bpo.job.launch import Ranks
from bpo.losses.program import LossProgram
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from tests.sample_groups import encode_all, encoder_of, three_groups


class PlainEngine(TrainingEngine):
    """The engine of training without DeepSpeed and optimizer."""

    def __init__(self, policy: PolicyModel, program: LossProgram, device: torch.device):
        self.program, self.ranks, self.device = program, Ranks(), device
        self.deepspeed: Any = policy
        self.on_forward, self.prepare_images = lambda: None, iter
        self.after_backward: Callable[[], None] = lambda: None

    def backward(self, loss: torch.Tensor, *, is_last: bool, after_forward: bool = True) -> None:
        loss.backward()
        self.after_backward()


def open_step(
    directory: Path, photos: Path, loss: LossConfig, device: str = "cpu", dtype: str = "float32"
) -> tuple[PlainEngine, list[GroupBatch], Config]:
    """The engine and three micro-batches of one group each, with the log-probs of a reference, in host memory."""
    model_config = ModelConfig(path=str(directory), dtype=dtype, attention="sdpa")
    config = Config(model=model_config, lora=LoraConfig(r=2, alpha=4))
    encoder, program = encoder_of(directory, photos), LossProgram(loss)
    model = load_model(config.model, for_training=True)
    prepare_trainable(model, encoder.family, config)
    batches = []
    for group in encode_all(encoder, three_groups()):
        batch = collate_groups([group], encoder.family, program.plan)
        batches.append(batch.with_reference(torch.full(batch.loss_inputs.completion_of_token_N.shape, -3.0)))
    return PlainEngine(PolicyModel(model.to(device)), program, torch.device(device)), batches, config
