"""Useful FLOPs compared with those that PyTorch counts.

Shape letters: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.collate import collate_groups
from bpo.data.families import family_of
from bpo.data.useful_work import attended_pairs, image_rows
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch, UsefulWork
from bpo.training.flops import ModelFlops, model_flops
from tests.sample_groups import encode_all, encoder_of, packed_batch, three_groups

CPU = torch.device("cpu")
CASES = {
    "lora": TrainableConfig(),
    "lora, frozen projector": TrainableConfig(projector="frozen"),
    "full": TrainableConfig(language="full"),
    "everything": TrainableConfig(language="full", vision="full"),
    "projector alone": TrainableConfig(language="frozen"),
    "frozen head": TrainableConfig(language="full", lm_head="frozen", projector="frozen"),
}


def executed_work(batch: GroupBatch, work: UsefulWork) -> UsefulWork:
    """The same with the masked pairs that SDPA computes too: a prefix's square, and all completions against all."""
    pairs = 0
    for (start, prefix_end), completions in zip(batch.layout.prefix_spans, batch.layout.completion_spans, strict=True):
        pairs += (prefix_end - start) ** 2 + (completions[-1][1] - prefix_end) * (completions[-1][1] - start)
    return replace(work, pairs=pairs)


def counted_flops(policy: PolicyModel, batch: GroupBatch, *, backward: bool) -> int:
    """FLOPs counted by FlopCounterMode; SDPA runs as plain products, which it counts on every device."""
    counter = FlopCounterMode(display=False)
    # A frozen head computes its gradient in the forward pass, unless there is none to compute.
    with counter, sdpa_kernel(SDPBackend.MATH), packed_layout(batch.layout), torch.set_grad_enabled(backward):
        logp_N = policy(**model_inputs(batch.to(CPU, torch.float32)))
        if backward:
            logp_N.sum().backward()
    return counter.get_total_flops()


def prepared(directory: Path, trainable: TrainableConfig, **options: Any) -> tuple[PolicyModel, ModelFlops]:
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32", **options),
        trainable=trainable,
        lora=LoraConfig(r=4, dropout=0.0),
    )
    model = load_model(config.model, for_training=True)
    family = family_of(model.config)
    prepare_trainable(model, family, config)
    return PolicyModel(model), model_flops(model, family)


def forward_of_all_layers(policy: PolicyModel, work: UsefulWork) -> int:
    """With the last layer of LLaVA's tower, which is computed but unused and not counted."""
    model = policy.model
    chosen = getattr(model.config, "vision_feature_layer", None)
    if chosen in (None, -1):
        return model_flops(model, family_of(model.config)).forward(work)
    assert chosen == -2
    model.config.vision_feature_layer = -1
    flops = model_flops(model, family_of(model.config)).forward(work)
    model.config.vision_feature_layer = chosen
    return flops


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ("llava", "qwen2_5_vl") for name in CASES]
    + [(family, "everything") for family in ("idefics3", "internvl", "llava_onevision", "qwen3_vl")],
)
def test_equals_what_pytorch_counts(
    family: str, name: str, family_dir: Callable[[str], Path], photo_root: Path
) -> None:
    directory = family_dir(family)
    batch = packed_batch(encoder_of(directory, photo_root), three_groups())
    policy, flops = prepared(directory, CASES[name])
    work = executed_work(batch, batch.useful_work)
    forward = forward_of_all_layers(policy, work)
    assert forward == pytest.approx(counted_flops(policy, batch, backward=False), rel=0.01)
    assert forward + flops.backward(work) == pytest.approx(counted_flops(policy, batch, backward=True), rel=0.01)
    assert flops.step(work) == flops.forward(work) + flops.backward(work) <= forward + flops.backward(work)


def test_frozen_weights_need_no_gradient_and_recomputation_is_not_useful(
    tiny_llava_dir: Path, photo_root: Path
) -> None:
    batch = packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())
    lora, full = (prepared(tiny_llava_dir, CASES[name])[1] for name in ("lora", "full"))
    work = batch.useful_work
    assert lora.head.weight_grad == 0 < full.head.weight_grad
    assert 4 * lora.language.weight_grad < full.language.weight_grad == full.language.forward
    assert lora.backward(work) < full.backward(work)
    policy, again = prepared(tiny_llava_dir, CASES["lora"], gradient_checkpointing=True)
    assert again == lora
    assert counted_flops(policy, batch, backward=True) > 1.1 * again.step(work)


def test_pairs_are_those_that_the_mask_lets_through() -> None:
    mask_TT = torch.ones(12, 12, dtype=torch.bool).tril()  # a prefix of 5, completions of 3 and 4
    mask_TT[8:, 5:8] = False
    assert attended_pairs(5, [3, 4]) == int(mask_TT.sum())


def test_fillers_and_stand_ins_do_no_useful_work(tiny_llava_dir: Path, photo_root: Path) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root)
    with_image = encode_all(encoder, three_groups())[:1]
    batch = collate_groups(with_image, encoder.family)
    assert batch.useful_work.patches == 5 and batch.useful_work.image_tokens == 4
    assert collate_groups(with_image, encoder.family, is_filler=True).useful_work == UsefulWork()

    text_only = [replace(with_image[0], prompt=replace(with_image[0].prompt, prefix_ids=(5, 6, 7), image_inputs={}))]
    alone = collate_groups(text_only, encoder.family).useful_work
    beside = collate_groups(text_only, encoder.family, stand_in=encoder.stand_in()).useful_work
    assert alone == beside
    assert beside.patches == beside.image_tokens == 0 and beside.tokens == 3 + beside.responses


def test_windows_of_the_qwen_tower(tiny_qwen_dir: Path, photo_root: Path) -> None:
    """A 5 x 4 grid of merged patches under windows of 4 x 4: one of 16 merged patches and one of 4."""
    config = encoder_of(tiny_qwen_dir, photo_root).family.config
    patches, whole, windows = image_rows({"image_grid_thw": torch.tensor([[1, 10, 8]])}, config)
    assert (patches, whole) == (80, 80**2)
    assert windows == 64**2 + 16**2
