"""Merged models and adapters load elsewhere and give the same logits.

Nothing is trained: a checkpoint is made by moving the trainable parameters at random, which exports like any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from bpo.checkpoint.export import find_checkpoint, run_export
from bpo.config.training import Config, ExportConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.data.encode import Encoder
from bpo.data.families import FAMILIES, family_of
from tests.sample_groups import encoder_of, turn
from tests.tiny import tiny_llava
from tests.trained_checkpoint import LORA, perturbed, write_checkpoint

# Of logits up to 2 in fp32: a merged adapter adds in another order. Largest observed: 1.4e-4 (Qwen2-VL).
TOLERANCE = 3e-4


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

    def export(
        self, output: Path, form: str = "merged", checkpoint: Path | None = None, base: Path | None = None
    ) -> Path:
        settings = ExportConfig(checkpoint=str(checkpoint or self.run), output=str(output), form=form)  # type: ignore[arg-type]
        return run_export(Config(export=settings, model=ModelConfig(path=str(base or self.base))))


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest,
    family_dir: Callable[[str], Path],
    photo_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    base = family_dir(request.param)
    return Trained(base, tmp_path_factory.mktemp("run"), encoder_of(base, photo_root))


@pytest.fixture(scope="module")
def trained_llava(tiny_llava_dir: Path, photo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny_llava_dir, tmp_path_factory.mktemp("run"), encoder_of(tiny_llava_dir, photo_root))


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
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"step-00000009 has no manifest.json.*export another checkpoint"):
        find_checkpoint(tmp_path)


def test_paths_and_trust_come_from_the_user_not_from_the_checkpoint(
    trained_llava: Trained, tmp_path: Path, tiny_llava_dir: Path
) -> None:
    """Code in the directory that a foreign manifest names does not run, although the manifest trusts it."""
    hostile = Path(shutil.copytree(tiny_llava_dir, tmp_path / "hostile"))
    settings = json.loads((hostile / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (hostile / "config.json").write_text(json.dumps(settings))
    (hostile / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    claims = replace(trained_llava.config.model, path=str(hostile), trust_remote_code=True)
    model = perturbed(trained_llava.config)
    run = write_checkpoint(tmp_path / "foreign", model, replace(trained_llava.config, model=claims)).parent.parent
    with pytest.raises(ValueError, match=r"model.path is empty; pass --model.path .*trained from .*hostile"):
        run_export(Config(export=ExportConfig(checkpoint=str(run), output=str(tmp_path / "a"))))
    with pytest.raises(ValueError, match=r"is not the model that the checkpoint was trained from.*evil.py"):
        trained_llava.export(tmp_path / "b", checkpoint=run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_another_base_model_is_refused_by_the_name_of_its_files(
    trained_llava: Trained, tmp_path: Path, change: str
) -> None:
    base = Path(shutil.copytree(trained_llava.base, tmp_path / "base"))
    name = {"weights": "model.safetensors", "tokenizer": "tokenizer_config.json"}[change]
    if change == "weights":
        moved = {tensor: value + 1 for tensor, value in load_file(base / name).items()}
        save_file(moved, base / name, metadata={"format": "pt"})
    else:
        (base / name).write_text((base / name).read_text() + " ")
    with pytest.raises(ValueError, match=rf"files differ \({name}\)"):
        trained_llava.export(tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()
    accepted = Config(
        export=ExportConfig(checkpoint=str(trained_llava.run), output=str(tmp_path / "merged")),
        model=ModelConfig(path=str(base)),
        train=TrainConfig(accept_changes=["weights"]),
    )
    assert (run_export(accepted) / "model.safetensors").exists()


def test_an_output_that_is_not_empty_is_left_alone(trained_llava: Trained, tmp_path: Path) -> None:
    """Neither the base model is overwritten, nor does an old tokenizer or index remain among new weights."""
    base = Path(shutil.copytree(trained_llava.base, tmp_path / "base"))
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(ValueError, match="is not an empty folder"):
        trained_llava.export(base, base=base)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    (tmp_path / "empty").mkdir()
    output = trained_llava.export(tmp_path / "empty")
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert trained_llava.export(output) == output  # a pipeline started again finds it done
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="is not an empty folder"):
        trained_llava.export(output, "adapter")


def test_the_latest_valid_checkpoint_is_exported_whatever_the_pointer_says(
    trained_llava: Trained, tmp_path: Path
) -> None:
    """A kill between rename and pointer leaves `latest` one save behind; a damaged later one is skipped."""
    run = Path(shutil.copytree(trained_llava.run, tmp_path / "run"))
    model = perturbed(trained_llava.config)
    newest = write_checkpoint(run, model, trained_llava.config, 8)
    write_checkpoint(run, model, trained_llava.config, 9)
    (run / "checkpoints" / "step-00000009" / "rank-00000.safetensors").write_bytes(b"cut")
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    assert find_checkpoint(run)[0] == newest
    (run / "checkpoints" / "best").write_text(newest.name)
    assert find_checkpoint(run / "checkpoints" / "best")[0] == newest
    assert (run / "checkpoints" / "step-00000009").exists()  # of a run that may be going on: nothing is renamed
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_weights_that_are_not_finite_are_not_exported(trained_llava: Trained, tmp_path: Path, form: str) -> None:
    model = perturbed(trained_llava.config)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[5] = float("nan")
    write_checkpoint(tmp_path / "run", model, trained_llava.config)
    with pytest.raises(ValueError, match=r"1 tensors contain NaN or infinite values, such as model\."):
        trained_llava.export(tmp_path / "out", form, checkpoint=tmp_path / "run")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_damaged_weights_are_not_exported(trained: Trained, tmp_path: Path) -> None:
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
