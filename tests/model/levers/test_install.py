"""All levers of a model together: what is selected, what is logged, and what the reference store remembers."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model.levers.install import choose_levers, install_levers, rounding_facts
from bpo.model.load import load_base, resolve_model
from bpo.model.trainable import prepare_trainable


def options(directory: Path, **lora: str) -> Config:
    model = ModelConfig(path=str(directory), dtype="float32")
    return Config(model=model, lora=LoraConfig(r=2, **lora), trainable=TrainableConfig(projector="frozen"))  # type: ignore[arg-type]


def test_nothing_is_changed_unless_it_is_requested_or_exact(tiny_llava_dir: Path, tiny_qwen_dir: Path) -> None:
    for directory, patches in ((tiny_llava_dir, {}), (tiny_qwen_dir, {"model.patch_embedding": "gemm"})):
        config = options(directory)
        for device in ("cpu", "cuda"):
            # The attention of a GPU is chosen from its properties, which this machine lacks.
            resolved = replace(
                resolve_model(config.model, torch.device("cpu"), for_training=True), device=torch.device(device)
            )
            assert rounding_facts(choose_levers(config, resolved)).items() >= patches.items()
            facts = rounding_facts(choose_levers(config, resolved))
            assert {k: v for k, v in facts.items() if k != "vision.encode"} == patches


def test_each_lever_logs_one_line_and_the_store_remembers_it(
    tiny_llava_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = options(tiny_llava_dir, kernel="addmm")
    resolved = resolve_model(config.model, for_training=True)
    levers = choose_levers(config, resolved)
    assert rounding_facts(levers)["lora.kernel"] == "addmm"
    model = load_base(resolved)
    family = family_of(model.config)
    prepare_trainable(model, family, config)
    names = [name for name, _ in model.named_parameters()]
    with caplog.at_level(logging.INFO, logger="bpo.model.levers.install"):
        install_levers(model, family, config, levers)
    lines = [one.getMessage() for one in caplog.records if one.name == "bpo.model.levers.install"]
    assert [line.split(":")[0] for line in lines] == list(levers)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_request_that_cannot_be_met_is_refused_before_anything_is_loaded(tiny_llava_dir: Path) -> None:
    config = options(tiny_llava_dir, kernel="fused", variant="dora")
    with pytest.raises(ValueError, match=r"lora\.kernel is fused, but lora\.variant is dora"):
        choose_levers(config, resolve_model(config.model, for_training=True))
