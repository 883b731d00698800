"""Model directories and PEFT adapters load for inference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bpo.config.adapter import split_adapter
from bpo.config.training import ModelConfig
from bpo.model.inference import load_for_inference
from tests.checkpoint.test_export import TOLERANCE, Trained
from tests.sample_groups import encoder_of


@pytest.fixture(scope="module")
def trained(tiny_llava_dir: Path, photo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny_llava_dir, tmp_path_factory.mktemp("run"), encoder_of(tiny_llava_dir, photo_root))


@pytest.fixture(scope="module")
def adapter(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.export(tmp_path_factory.mktemp("export") / "adapter", "adapter")


def options(path: Path, **others: bool) -> ModelConfig:
    return ModelConfig(path=str(path), dtype="float32", **others)


def test_an_adapter_loads_alone_and_with_its_base(trained: Trained, adapter: Path) -> None:
    assert split_adapter(options(adapter)) == (options(trained.base), str(adapter))
    for model in (load_for_inference(options(adapter)), load_for_inference(options(trained.base), str(adapter))):
        assert not model.training and type(model).__name__ == "LlavaForConditionalGeneration"
        torch.testing.assert_close(trained.logits_of(model), trained.logits, atol=TOLERANCE, rtol=0)


def test_a_model_directory_loads_as_it_is(trained: Trained) -> None:
    assert split_adapter(options(trained.base)) == (options(trained.base), "")
    logits = trained.logits_of(load_for_inference(options(trained.base)))
    assert (logits - trained.logits).abs().max() > 100 * TOLERANCE


def test_half_precision_keeps_the_adapter_apart_from_the_base(trained: Trained, adapter: Path) -> None:
    model = load_for_inference(ModelConfig(path=str(adapter), dtype="bfloat16"))
    names = [name for name, _ in model.named_parameters()]
    assert any(".lora_A." in name for name in names) and any(".base_layer." in name for name in names)


def _without_base(folder: Path, base: object) -> None:
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text()), "base_model_name_or_path": base}
    path.write_text(json.dumps(settings))


def test_faults_are_named(trained: Trained, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="is an adapter: with model.trust_remote_code, it would choose whose code runs"
    ):
        split_adapter(options(adapter, trust_remote_code=True))
    with pytest.raises(ValueError, match="is an adapter itself; give the base model with the adapter"):
        load_for_inference(options(adapter), str(adapter))
    with pytest.raises(ValueError, match="has no adapter_config.json, so it is not a PEFT adapter"):
        load_for_inference(options(trained.base), str(tmp_path))
    damaged = shutil.copytree(adapter, tmp_path / "adapter")
    _without_base(damaged, None)
    with pytest.raises(ValueError, match="adapter_config.json: base_model_name_or_path is None; set it"):
        split_adapter(options(damaged))
    (damaged / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name base_model_name_or_path"):
        split_adapter(options(damaged))
    (damaged / "adapter_model.safetensors").unlink()
    shutil.copy(adapter / "adapter_config.json", damaged)
    with pytest.raises(ValueError, match=r"the adapter .* does not fit"):
        load_for_inference(options(damaged))
