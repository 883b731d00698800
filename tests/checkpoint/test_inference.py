"""A checkpoint loads for inference without an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.checkpoint.inference import load_checkpoint
from bpo.config.training import ModelConfig
from tests.checkpoint.test_export import TOLERANCE, Trained
from tests.sample_groups import encoder_of


def test_a_run_and_its_checkpoint_give_the_trained_model(
    tiny_llava_dir: Path, photo_root: Path, tmp_path: Path
) -> None:
    trained = Trained(tiny_llava_dir, tmp_path / "run", encoder_of(tiny_llava_dir, photo_root))
    options = ModelConfig(path=str(tiny_llava_dir))  # of another dtype: that of the training is used
    for path in (trained.run, trained.checkpoint):
        model = load_checkpoint(options, path)
        assert not model.training and model.dtype == torch.float32
        torch.testing.assert_close(trained.logits_of(model), trained.logits, atol=TOLERANCE, rtol=0)


def test_another_base_is_refused(tiny_llava_dir: Path, tiny_qwen_dir: Path, photo_root: Path, tmp_path: Path) -> None:
    trained = Trained(tiny_llava_dir, tmp_path / "run", encoder_of(tiny_llava_dir, photo_root))
    with pytest.raises(ValueError, match="is not the model that the checkpoint was trained from"):
        load_checkpoint(ModelConfig(path=str(tiny_qwen_dir)), trained.checkpoint)
    with pytest.raises(ValueError, match="neither a checkpoint nor a run directory"):
        load_checkpoint(ModelConfig(path=str(tiny_llava_dir)), tmp_path)
