"""Merged models and adapters load elsewhere and give the same logits.

Nothing is trained: a checkpoint is made by moving the trainable parameters at random, which exports like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bpo.checkpoint.export import find_checkpoint, run_export
from bpo.checkpoint.files import commit, seal_file, step_dir
from bpo.checkpoint.shards import KINDS, Fragment, Shard, shard_name
from bpo.config.io import to_tree
from bpo.config.training import Config, ExportConfig, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.encode import Encoder
from bpo.data.families import FAMILIES, family_of
from bpo.model.load import load_model
from bpo.model.trainable import prepare_trainable
from tests.sample_groups import encoder_of, turn
from tests.tiny import tiny_llava

# Of logits up to 2 in fp32: a merged adapter adds in another order. Largest observed: 1.4e-4 (Qwen2-VL).
TOLERANCE = 3e-4
LORA = LoraConfig(r=4, alpha=8, dropout=0.1)


def perturbed(config: Config) -> Any:
    """The prepared model with every trainable parameter moved."""
    model = load_model(config.model)
    prepare_trainable(model, family_of(model.config), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def write_checkpoint(run: Path, model: Any, config: Config) -> Path:
    """As one rank of a training run would have written it."""
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.float().flatten() for p in named.values()])
    fragments, at = [], 0
    for name, p in named.items():
        fragments.append(Fragment(name, tuple(p.shape), str(p.dtype)[6:], 0, p.numel(), 0, at))
        at += p.numel()
    shard = Shard(fragments, 3, {f"{kind}.0": flat.clone() for kind in KINDS})
    final = step_dir(run, 3)
    temporary = final.with_suffix(".tmp")
    temporary.mkdir(parents=True)
    shard.write(temporary / shard_name(0))
    files = {shard_name(0): seal_file(temporary / shard_name(0))}
    commit(temporary, final, {"step": 3, "world_size": 1, "config": to_tree(config), "files": files})
    return final


class Trained:
    """A run directory with a checkpoint, and the logits of its model."""

    def __init__(self, base: Path, run: Path, encoder: Encoder, **sections: Any):
        self.config = Config(model=ModelConfig(path=str(base), dtype="float32"), **{"lora": LORA, **sections})
        self.base, self.run = base, run
        prompt = encoder.encode_prompt("r", ["tall.png"], [turn(None, "What is this?")])
        ids_1T = torch.tensor(prompt.prefix_ids)[None]
        self.inputs = {"input_ids": ids_1T, **prompt.image_inputs, **encoder.family.generation_inputs(ids_1T)}
        model = perturbed(self.config)
        self.logits = self.logits_of(model)
        self.checkpoint = write_checkpoint(run, model, self.config)

    def config_of_model(self) -> Any:
        return AutoConfig.from_pretrained(self.base)

    @torch.no_grad()
    def logits_of(self, model: Any) -> torch.Tensor:
        return model(**self.inputs).logits

    def export(self, output: Path, form: str = "merged", checkpoint: Path | None = None) -> Path:
        settings = ExportConfig(checkpoint=str(checkpoint or self.run), output=str(output), form=form)  # type: ignore[arg-type]
        return run_export(Config(export=settings))


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest,
    family_dir: Callable[[str], Path],
    photo_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    base = family_dir(request.param)
    return Trained(base, tmp_path_factory.mktemp("run"), encoder_of(base, photo_root))


def auto_model(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def test_the_checkpoint_differs_from_the_base(trained: Trained) -> None:
    """What follows is worth something: a model that lost its training would not pass."""
    assert float((trained.logits - trained.logits_of(auto_model(trained.base))).abs().max()) > 0.1


def test_merged_directory_loads_alone_and_gives_the_same_logits(
    trained: Trained, tmp_path: Path, photo_root: Path
) -> None:
    output = trained.export(tmp_path / "merged")
    torch.testing.assert_close(trained.logits_of(auto_model(output)), trained.logits, atol=TOLERANCE, rtol=0)
    prompt = encoder_of(output, photo_root).encode_prompt("r", ["tall.png"], [turn(None, "What is this?")])
    assert torch.equal(torch.tensor(prompt.prefix_ids)[None], trained.inputs["input_ids"])  # the processor was copied
    assert "lora" not in (output / "config.json").read_text()


def test_adapter_loads_with_peft_and_gives_the_same_logits(trained: Trained, tmp_path: Path) -> None:
    import peft

    if family_of(trained.config_of_model()).projector_parameters:
        with pytest.raises(ValueError, match=r"cannot hold model.image_newline.*use export.form=merged"):
            trained.export(tmp_path / "adapter", "adapter")
        return
    output = trained.export(tmp_path / "adapter", "adapter")
    assert not (output / "model.safetensors").exists()
    adapted = peft.PeftModel.from_pretrained(auto_model(trained.base), str(output)).eval()
    torch.testing.assert_close(trained.logits_of(adapted), trained.logits, atol=TOLERANCE, rtol=0)
    with adapted.disable_adapter():  # the projector is part of the adapter
        base_logits = trained.logits_of(auto_model(trained.base))
        torch.testing.assert_close(trained.logits_of(adapted), base_logits, atol=TOLERANCE, rtol=0)
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (4, 8, True)


def test_adapter_without_a_projector(tiny_llava_dir: Path, photo_root: Path, tmp_path: Path) -> None:
    import peft

    frozen = TrainableConfig(projector="frozen")
    trained = Trained(tiny_llava_dir, tmp_path / "run", encoder_of(tiny_llava_dir, photo_root), trainable=frozen)
    output = trained.export(tmp_path / "adapter", "adapter")
    adapted = peft.PeftModel.from_pretrained(auto_model(tiny_llava_dir), str(output)).eval()
    torch.testing.assert_close(trained.logits_of(adapted), trained.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_exports_merged_only(photo_root: Path, tmp_path: Path, tied: bool) -> None:
    base = tiny_llava(tmp_path / "base", tie_word_embeddings=tied)
    full = TrainableConfig(language="full", vision="full")
    trained = Trained(base, tmp_path / "run", encoder_of(base, photo_root), trainable=full)
    output = trained.export(tmp_path / "merged")
    torch.testing.assert_close(trained.logits_of(auto_model(output)), trained.logits, atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="export.form=adapter needs trainable.language=lora.*language=full"):
        trained.export(tmp_path / "adapter", "adapter")
    assert not (tmp_path / "adapter").exists()  # nothing partially written


def test_a_checkpoint_by_its_own_path_and_a_model_that_moved(
    trained: Trained, tmp_path: Path, photo_root: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(trained.base)
    settings = ExportConfig(checkpoint=str(trained.checkpoint), output=str(tmp_path / "merged"))
    output = run_export(replace(Config(export=settings), model=ModelConfig(path=str(moved))))
    torch.testing.assert_close(trained.logits_of(auto_model(output)), trained.logits, atol=TOLERANCE, rtol=0)


def test_missing_paths_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export.checkpoint and export.output must both be given"):
        run_export(Config())
    with pytest.raises(ValueError, match="neither a checkpoint nor a run directory"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009")
    with pytest.raises(ValueError, match="step-00000009"):
        find_checkpoint(tmp_path)


def test_damaged_weights_are_not_exported(trained: Trained, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    weights = run / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="rank-00000.safetensors.*damaged"):
        trained.export(tmp_path / "merged", checkpoint=run)


@pytest.mark.parametrize("trained", ["llava", "qwen2_5_vl"], indirect=True)
def test_weights_of_another_model_or_of_part_of_it_are_refused(trained: Trained, tmp_path: Path) -> None:
    model = perturbed(trained.config)
    short = Config(model=trained.config.model, lora=replace(LORA, target=["q_proj"]))
    write_checkpoint(tmp_path / "more", model, short)  # more adapters than this configuration
    with pytest.raises(ValueError, match="parameters the model lacks"):
        trained.export(tmp_path / "a", checkpoint=tmp_path / "more")
    partial = perturbed(short)
    write_checkpoint(tmp_path / "less", partial, trained.config)
    with pytest.raises(ValueError, match="lacks parameters that were trained"):
        trained.export(tmp_path / "b", checkpoint=tmp_path / "less")
