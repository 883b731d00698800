"""Where a step waits for the device: nowhere between micro-batches, apart from the model's own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.loss import LossConfig, TermConfig
from bpo.config.training import Config, LoraConfig, ModelConfig
from bpo.data.collate import collate_groups
from bpo.engine import TrainingEngine
from bpo.job.launch import Ranks
from bpo.losses.program import LossProgram
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.training import loss_state
from bpo.training.step import run_step
from tests.device_reads import DeviceReads
from tests.sample_groups import encode_all, encoder_of, three_groups

LOSSES = {
    "sigmoid": LossConfig(chosen_nll_weight=0.1),
    "stateful": LossConfig(terms=[TermConfig(type="bco_pair"), TermConfig(name="changed", token_weights="changed")]),
}
# Functions of transformers that read the device in each forward pass (docs/performance.md).
OF_THE_MODEL = {
    "llava": {"torch_compilable_check", "get_placeholder_mask", "find_packed_sequence_indices"},
    "qwen2_5_vl": {
        "torch_compilable_check",
        "get_placeholder_mask",
        "get_vision_position_ids",
        "get_vision_cu_seqlens",
        "get_vision_window_index",
        "get_image_features",
        "<listcomp>",  # the split of a layer of the tower into images or windows
        "forward",
    },
}


class Engine(TrainingEngine):
    """The engine without DeepSpeed; notes what has been read when the last backward pass is over."""

    def __init__(self, policy: PolicyModel, program: LossProgram, reads: DeviceReads):
        self.program, self.ranks, self.device = program, Ranks(), torch.device("cpu")
        self.deepspeed: Any = policy
        self.on_forward, self.prepare_images = lambda: None, iter
        self.reads, self.during_passes = reads, list[list[str]]()

    def backward(self, loss: torch.Tensor, *, is_last: bool, after_forward: bool = True) -> None:
        loss.backward()
        self.during_passes = list(self.reads.found)


def in_code(reads: list[list[str]], folder: str) -> list[list[str]]:
    """Reads that a function of `folder` makes, without those that only tensors on a CPU are subject to."""
    return [read for read in reads if f"/{folder}/" in read[1] and "/kernels/checks.py:" not in read[1]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_a_step_reads_the_device_once(
    name: str,
    loss: str,
    family_dir: Callable[[str], Path],
    photo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_state, "gather_from_ranks", lambda item: [item])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    directory = family_dir(name)
    config = Config(model=ModelConfig(path=str(directory), dtype="float32"), lora=LoraConfig(r=2, alpha=4))
    encoder, program = encoder_of(directory, photo_root), LossProgram(LOSSES[loss])
    model = load_model(config.model, for_training=True)
    prepare_trainable(model, encoder.family, config)
    policy = PolicyModel(model)
    batches = []
    for group in encode_all(encoder, three_groups()):
        batch = collate_groups([group], encoder.family, program.plan)
        batches.append(batch.with_reference(torch.full(batch.loss_inputs.completion_of_token_N.shape, -3.0)))
    reads = DeviceReads([*policy.parameters(), *policy.buffers(), *(t for batch in batches for t in batch.tensors())])
    engine = Engine(policy, program, reads)
    with reads:
        sums = run_step(engine, batches, config, 4, step=0)
        states = in_code(reads.found[len(engine.during_passes) :], "bpo")
        totals, norm = engine.read_step(sums.on_device(), torch.ones(()))
    assert in_code(engine.during_passes, "bpo") == in_code(engine.during_passes, "kernels") == []
    made_by = {
        frame.rpartition(":")[2] for frame in (read[1] for read in engine.during_passes) if "transformers" in frame
    }
    assert made_by and made_by <= OF_THE_MODEL[name], made_by - OF_THE_MODEL[name]
    assert len(states) == len(program.states)  # a stateful loss needs its numbers on the host, once per step
    after = in_code(reads.found[len(engine.during_passes) :], "bpo")
    assert [read[0] for read in after[len(states) :]] == ["tolist"]
    assert totals == pytest.approx(sums.flat(), rel=1e-12) and norm == 1.0
