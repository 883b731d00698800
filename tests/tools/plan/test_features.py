"""What it costs to keep features: against formulas, a real tower's output and the counter of FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.config.loss import LossConfig
from bpo.config.training import Config, TrainableConfig
from bpo.losses.program import LossProgram
from bpo.tools.plan.features import FeatureCost, describe, feature_cost
from bpo.tools.plan.group import average_group, typical_group, typical_image
from bpo.tools.plan.shape import shape_of
from bpo.tools.plan.speed import Machine
from bpo.training.hardware import accelerator


def cost_of(model: str, gpu: str = "h100", **trained: Any) -> FeatureCost | None:
    shape = shape_of(model, Config(trainable=TrainableConfig(**trained)))
    plan, image = LossProgram(LossConfig(), 0).plan, typical_image(shape.config)
    group, _ = average_group([typical_group(plan, image, 64, 150, 3)], plan, image)
    return feature_cost(shape, Machine(accelerator(gpu)), group.step)


def test_llava() -> None:
    """CLIP ViT-L/14 at 336 px: 576 patches and a class token, 23 of 24 layers of 12 width^2 weights."""
    cost = cost_of("llava-1.5-7b")
    assert cost is not None
    assert cost.num_bytes == pytest.approx(577 * 1024 * 2)
    weights = 23 * 12 * 1024**2 + 1024 * 3 * 14**2
    attention = 2 * 23 * 1024 * 577**2
    assert cost.flops == pytest.approx(2 * (577 * weights + attention), rel=0.01)
    assert cost.encode_s == pytest.approx(cost.flops / (0.4 * 989.4e12))
    assert cost.step_share < 0.02


def test_qwen(family_dir: Callable[[str], Path]) -> None:
    """Four patches per token before the merger; Qwen3-VL has mergers of two intermediate layers more."""
    for model, width, inputs in (("qwen2-vl-2b", 1280, 1), (str(family_dir("qwen3_vl")), 32, 3)):
        cost = cost_of(model)
        assert cost is not None and cost.num_bytes == 4 * 1024 * width * inputs * 2


def test_a_trained_tower_has_no_features_to_keep() -> None:
    assert cost_of("llava-1.5-7b", vision="full") is None
    assert describe(None) == []


def test_when_it_pays() -> None:
    cost = FeatureCost(1e6, 1e12, encode_s=2e-3, copy_s=1e-3, disk_gb_s=2.0, step_share=0.01)
    assert cost.read_s == pytest.approx(1.5e-3)
    assert cost.passes == pytest.approx(1.0)  # 0.5 ms to write, of which each pass saves as much
    assert cost.least_gb_s == pytest.approx(1.0)
    assert "pays after 1.0 passes" in describe(cost)[-1]
    slow = replace(cost, disk_gb_s=0.5)
    assert slow.passes is None and "pays from 1.0 GB/s per GPU" in describe(slow)[-1]
    never = replace(cost, copy_s=3e-3)
    assert never.least_gb_s is None and "never pays" in describe(never)[-1]
