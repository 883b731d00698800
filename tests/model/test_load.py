"""Loading models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from bpo.config.training import ModelConfig
from bpo.model.attention import shared_prefix as attention
from bpo.model.load import load_model, load_resolved, resolve_model


def test_for_generation_in_eval_mode_with_plain_attention(tiny_qwen_dir: Path) -> None:
    model = load_model(ModelConfig(path=str(tiny_qwen_dir), dtype="float32"))
    assert not model.training
    assert model.config.text_config._attn_implementation == "sdpa"


def test_for_training_only_the_text_model_shares_prefixes(tiny_qwen_dir: Path) -> None:
    config = ModelConfig(path=str(tiny_qwen_dir), dtype="bfloat16", vision_attention="eager")
    model = load_model(config, for_training=True)
    assert model.model.language_model.config._attn_implementation == attention.BACKENDS["sdpa"].registered_name
    assert model.model.visual.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_two_loaded_models_do_not_share_their_attention(tiny_llava_dir: Path) -> None:
    config = ModelConfig(path=str(tiny_llava_dir), dtype="float32")
    training, plain = load_model(config, for_training=True), load_model(config)
    assert training.model.language_model.config._attn_implementation == attention.BACKENDS["sdpa"].registered_name
    assert plain.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("config", torch.float32)])
def test_dtype_by_name_or_as_stored(name: str, dtype: torch.dtype, tiny_llava_dir: Path) -> None:
    assert resolve_model(ModelConfig(path=str(tiny_llava_dir), dtype=name)).dtype == dtype


def test_missing_path_and_unsupported_type_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.path is empty"):
        load_model(ModelConfig())
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`llama` is not supported; supported: gemma3, .*, smolvlm"):
        load_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("gone", "no such directory"),
        ("config.json", "the directory has no config.json"),
        ("model.safetensors", "the directory has no weights"),
        ("cut", "model.safetensors is damaged or cut off"),
        ("shard", "weight files are missing: model-2.safetensors"),
    ],
)
def test_a_model_directory_that_changes_after_the_start_says_what_is_missing(
    damage: str, fault: str, tmp_path: Path, tiny_llava_dir: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    resolved = resolve_model(ModelConfig(path=str(folder), dtype="float32"))
    weights = folder / "model.safetensors"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "shard":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    else:
        (folder / damage).unlink()
    with pytest.raises(ValueError, match=f"^model.path is '{folder}': {fault}[^\n]*$"):
        load_resolved(resolved) if damage != "config.json" else resolve_model(resolved.options)


def test_a_hub_id_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="^model.path is 'no/such': no such directory, and no such model in the Hub's"):
        resolve_model(ModelConfig(path="no/such"))


def test_code_of_a_model_runs_only_if_the_user_trusts_it(tmp_path: Path, tiny_llava_dir: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Custom"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    with pytest.raises(
        ValueError, match=r"^model.path is [^\n]* its own code; [^\n]* set model.trust_remote_code to true$"
    ):
        resolve_model(ModelConfig(path=str(folder)))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AttributeError, match="Custom"):  # what the code defines is no config
        resolve_model(ModelConfig(path=str(folder), trust_remote_code=True))
    assert (tmp_path / "ran").exists()
