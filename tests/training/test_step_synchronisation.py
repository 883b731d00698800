"""Where a step waits for the device: nowhere between micro-batches, apart from the model's own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bpo.config.loss import LossConfig, TermConfig
from bpo.training import loss_state
from bpo.training.step import run_step
from tests.device_reads import DeviceReads, in_own_code
from tests.step_engine import open_step

LOSSES = {
    "sigmoid": LossConfig(chosen_nll_weight=0.1),
    "stateful": LossConfig(terms=[TermConfig(type="bco_pair"), TermConfig(name="changed", token_weights="changed")]),
}
# Functions of transformers that read the device in each forward pass.
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
    engine, batches, config = open_step(family_dir(name), photo_root, LOSSES[loss])
    policy = engine.deepspeed
    reads = DeviceReads([*policy.parameters(), *policy.buffers(), *(t for batch in batches for t in batch.tensors())])
    passes: list[list[str]] = []
    engine.after_backward = lambda: passes.extend(reads.found[len(passes) :])
    with reads:
        sums = run_step(engine, batches, config, 4, step=0)
        states = in_own_code(reads.found[len(passes) :])
        totals, norm = engine.read_step(sums.on_device(), torch.ones(()))
    assert in_own_code(passes) == []
    made_by = {frame.rpartition(":")[2] for frame in (read[1] for read in passes) if "transformers" in frame}
    assert made_by and made_by <= OF_THE_MODEL[name], made_by - OF_THE_MODEL[name]
    assert len(states) == len(engine.program.states)  # a stateful loss needs its numbers on the host, once per step
    after = in_own_code(reads.found[len(passes) :])
    assert [read[0] for read in after[len(states) :]] == ["tolist"]
    assert totals == pytest.approx(sums.flat(), rel=1e-12) and norm == 1.0
