"""Exports of a run on quantised weights: of the stored base, and of the adapter, which runs on either."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpo.checkpoint.export import run_export
from bpo.checkpoint.inference import load_checkpoint
from bpo.config.training import Config, ExportConfig, ModelConfig
from bpo.model.inference import load_for_inference
from tests.sample_groups import encoder_of, turn
from tests.trained_checkpoint import LORA, perturbed, write_checkpoint


def test_the_base_is_exported_unquantised_and_the_adapter_runs_on_both(
    tiny_llava_dir: Path, photo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = ModelConfig(path=str(tiny_llava_dir), dtype="float32")
    quantized = replace(plain, quantization="int8")
    config = Config(model=quantized, lora=LORA)
    config.trainable.projector = "frozen"
    trained = perturbed(config)
    write_checkpoint(tmp_path / "run", trained, config)
    prompt = encoder_of(tiny_llava_dir, photo_root).encode_prompt("r", ["tall.png"], [turn(None, "What is this?")])
    inputs = {"input_ids": torch.tensor(prompt.prefix_ids)[None], **prompt.image_inputs}

    def export(form: str, model: ModelConfig) -> str:
        options = ExportConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / form), form=form)  # type: ignore[arg-type]
        return str(run_export(Config(export=options, model=model)))

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(**inputs).logits

    as_trained = logits(trained)
    on_stored_base = logits(perturbed(replace(config, model=plain)))  # the same adapter
    assert float((as_trained - on_stored_base).abs().max()) > 1e-2
    with caplog.at_level(logging.WARNING):
        merged = export("merged", quantized)  # the run's own options
        adapter = export("adapter", plain)
    assert caplog.text.count("was trained on int8 weights") == 2
    for expected, model in (
        (on_stored_base, load_for_inference(replace(plain, path=merged))),
        (on_stored_base, load_for_inference(plain, adapter)),
        (as_trained, load_for_inference(quantized, adapter)),
        (as_trained, load_checkpoint(quantized, tmp_path / "run")),
    ):
        torch.testing.assert_close(logits(model), expected, atol=3e-4, rtol=0)
