"""Which adapters vLLM accepts. That PEFT loads them with the trained logits is in test_export.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bpo.checkpoint.adapter import write_adapter
from bpo.config.adapter import CONFIG_FILE, WEIGHTS_FILE
from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.model.adapter import check_vllm_format
from bpo.model.load import load_model
from tests.trained_checkpoint import LORA, perturbed


def adapter(folder: Path, base: Path, lora: LoraConfig = LORA, projector: str = "frozen") -> Path:
    trainable = TrainableConfig(projector=projector)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(path=str(base), dtype="float32"), lora=lora, trainable=trainable)
    model = perturbed(config)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    folder.mkdir()
    write_adapter(folder, load_model(config.model), state, config.model, trainable, lora)
    return folder


@pytest.mark.parametrize(("rank", "flag"), [(4, ""), (24, " --max-lora-rank 32")])
def test_an_adapter_of_the_language_model_is_accepted(
    tiny_llava_dir: Path, tmp_path: Path, rank: int, flag: str
) -> None:
    output = adapter(tmp_path / "a", tiny_llava_dir, replace(LORA, r=rank))
    assert check_vllm_format(output) == (True, f"--enable-lora{flag} --lora-modules NAME=PATH")


def test_a_trained_projector_is_refused_with_the_fix(tiny_llava_dir: Path, tmp_path: Path) -> None:
    accepted, why = check_vllm_format(adapter(tmp_path / "a", tiny_llava_dir, projector="full"))
    assert not accepted
    assert why == (
        "it contains the trained projector (multi_modal_projector, modules_to_save); serve the merged form "
        "(--export.form merged)"
    )


def test_what_else_vllm_refuses(tiny_llava_dir: Path, tmp_path: Path) -> None:
    output = adapter(tmp_path / "a", tiny_llava_dir)
    settings = json.loads((output / CONFIG_FILE).read_text())
    (output / CONFIG_FILE).write_text(json.dumps(settings | {"r": 600, "use_dora": True, "bias": "all"}))
    weights = load_file(output / WEIGHTS_FILE)
    save_file(weights | {"base_model.model.lm_head.weight": weights.popitem()[1]}, output / WEIGHTS_FILE)
    accepted, why = check_vllm_format(output)
    assert not accepted
    for part in ("such as base_model.model.lm_head.weight", "it uses DoRA", "bias=all", "rank 600 is above 512"):
        assert part in why
