"""Backend selection, and rejected settings."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from bpo.config.io import load_config
from bpo.config.training import Config, ModelConfig
from bpo.model.attention import choice as attention_choice
from bpo.model.attention.choice import Choice, Needs, choose_backend, obstacle
from bpo.model.load import ResolvedModel, load_model, resolve_model
from bpo.model.reference import store
from bpo.training import reference_pass

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = Needs(CUDA, torch.bfloat16, head_size=128)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with the given compute capability and libraries; a version of None is not installed."""
    find_spec = attention_choice.importlib.util.find_spec

    def make(
        capability: tuple[int, int] = (9, 0),
        flash: str | None = "2.8.3",
        flash3: str | None = None,
        error: str = "",
        varlen: bool = True,
        varlen_error: str = "",
    ) -> None:
        def fail_with(text: str) -> None:
            if text:
                raise ImportError(text)

        versions = {"flash-attn": flash, "flash_attn_3": flash3}
        installed = {"triton": True, "flash_attn_interface": flash3 is not None}
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: varlen)
        monkeypatch.setattr(attention_choice, "_version", versions.get)
        for look_up in ("flash_attn_2", "flash_attn_3"):
            monkeypatch.setattr(attention_choice, look_up, lambda: fail_with(error))
        monkeypatch.setattr(attention_choice, "torch_varlen_attn", lambda: fail_with(varlen_error))
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name: (object() if installed[name] else None) if name in installed else find_spec(name),
        )

    make()
    return make


def test_auto_takes_flash_then_varlen_then_flex_and_sdpa_on_cpu(machine) -> None:
    assert choose_backend("auto", BF16) == Choice("flash", "flash-attn 2.8.3 on cuda in bfloat16")
    machine(flash3="3.0.0")
    assert choose_backend("auto", BF16) == Choice("flash3", "flash-attn 3 (3.0.0) on cuda in bfloat16")
    machine(flash=None)
    choice = choose_backend("auto", BF16)
    assert choice.backend == "varlen" and "pip install 'bpo[flash]'" in choice.reason
    assert f"varlen_attn of PyTorch {torch.__version__}" in choice.reason
    machine(flash=None, varlen=False)
    choice = choose_backend("auto", BF16)
    assert choice.backend == "flex" and "not varlen: PyTorch" in choice.reason
    choice = choose_backend("auto", Needs(CPU, torch.bfloat16))
    assert choice.backend == "sdpa" and "cpu" in choice.reason
    choice = choose_backend("auto", Needs(CUDA, torch.float32, dropout=0.1))
    assert choice.backend == "sdpa" and "float32" in choice.reason and "no dropout" in choice.reason


@pytest.mark.parametrize("requested", ["auto", "flash"])
@pytest.mark.parametrize(
    ("has", "dropout", "message"),
    [
        ({"capability": (8, 0)}, 0.0, r"not flash3: flash-attn 3 needs compute capability 9\.0 and this GPU has 8\.0"),
        ({"capability": (10, 0)}, 0.0, r"this GPU has 10\.0"),
        ({}, 0.1, "not flash3: flash-attn 3 has no dropout and the model's attention_dropout is 0.1"),
    ],
)
def test_flash_attn_2_serves_what_3_cannot(machine, requested: str, has: dict, dropout: float, message: str) -> None:
    machine(flash3="3.0.0", **has)
    choice = choose_backend(requested, replace(BF16, dropout=dropout))
    assert choice.backend == "flash" and re.search(message, choice.reason) and "flash-attn 2.8.3" in choice.reason
    machine(flash3="3.0.0", flash=None, **has)
    with pytest.raises(ValueError, match="flash-attn 3 .*; flash-attn is not installed: pip install"):
        choose_backend("flash", replace(BF16, dropout=dropout))


def test_flash_takes_version_3_where_it_runs_and_version_2_where_3_is_broken(machine) -> None:
    machine(flash3="3.0.0", flash=None)
    assert choose_backend("flash", BF16).backend == "flash3"
    machine(flash3="3.0.0", error="undefined symbol")
    message = r"flash-attn 3 \(3.0.0\) cannot be imported \(undefined symbol\).*; flash-attn 2.8.3 cannot be imported"
    with pytest.raises(ValueError, match=message):
        choose_backend("flash", BF16)


@pytest.mark.parametrize(
    ("has", "needs", "message"),
    [
        ({"flash": None}, BF16, r"not installed: pip install 'bpo\[flash\]'"),
        ({"flash": "2.7.4.post1"}, BF16, "flash-attn is 2.7.4.post1"),
        ({"error": "undefined symbol"}, BF16, r"cannot be imported \(undefined symbol\)"),
        ({"capability": (7, 5)}, BF16, r"has 7\.5"),
        ({}, Needs(CUDA, torch.float32), "model.dtype is float32: set model.dtype"),
        ({}, Needs(CUDA, torch.bfloat16, head_size=320), "this model's is 320"),
        ({}, Needs(CPU, torch.bfloat16), "needs a CUDA GPU"),
    ],
)
def test_flash_where_it_cannot_run_is_refused_and_auto_says_why(machine, has: dict, needs: Needs, message: str) -> None:
    machine(**has)
    with pytest.raises(ValueError, match=message):
        choose_backend("flash", needs)
    assert re.search(message, obstacle("flash", needs))
    if needs.device == CUDA:
        choice = choose_backend("auto", needs)
        assert choice.backend in ("varlen", "flex") and choice.reason.startswith("not flash")


@pytest.mark.parametrize(
    ("has", "needs", "message"),
    [
        ({"varlen": False}, BF16, "was built without flash attention: set it to flex"),
        ({"varlen_error": "cannot import name"}, BF16, "has no varlen_attn .* update to 2.11, or set it to flex"),
        ({"capability": (7, 5)}, BF16, r"varlen_attn needs compute capability 8\.0 and this GPU has 7\.5"),
        ({}, Needs(CUDA, torch.float32), "varlen_attn supports bfloat16 and float16"),
        ({}, Needs(CUDA, torch.bfloat16, head_size=320), "up to 256 and this model's is 320"),
        ({}, Needs(CUDA, torch.bfloat16, head_size=36), "divisible by 8 and this model's is 36"),
        ({}, Needs(CUDA, torch.bfloat16, dropout=0.1), "varlen_attn has no dropout"),
        ({}, Needs(CPU, torch.bfloat16), "varlen_attn needs a CUDA GPU and this is cpu: set it to sdpa"),
    ],
)
def test_varlen_where_it_cannot_run_is_refused(machine, has: dict, needs: Needs, message: str) -> None:
    machine(**has)
    with pytest.raises(ValueError, match=f"model.attention is varlen, but .*{message}"):
        choose_backend("varlen", needs)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(CPU, torch.float32), "no backward pass on cpu"),
        (Needs(CUDA, torch.float32, dropout=0.1), "no dropout"),
        (Needs(CUDA, torch.float32, head_size=8), "from 16 and this model's is 8"),
    ],
)
def test_flex_where_it_cannot_run_is_refused(machine, needs: Needs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend("flex", needs)


def test_sdpa_runs_everywhere(machine) -> None:
    for device in (CPU, CUDA):
        assert obstacle("sdpa", Needs(device, torch.float32)) is None
        assert choose_backend("sdpa", Needs(device, torch.float32)).backend == "sdpa"


def test_a_models_needs_are_read_from_its_config() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, attention_dropout=0.1)
    assert Needs.of_model(config, CPU, torch.float32) == Needs(CPU, torch.float32, 16, 0.1, copies_keys=True)
    config.num_key_value_heads = 2
    assert not Needs.of_model(config, CPU, torch.float32).copies_keys
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32)
    assert Needs.of_model(config, CPU, torch.float32).head_size == 32


def test_the_option_is_refused_before_the_weights_are_read(tiny_llava_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        if (tiny_llava_dir / name).exists():
            (tmp_path / name).write_bytes((tiny_llava_dir / name).read_bytes())
    config = ModelConfig(path=str(tmp_path), dtype="float32", attention="flash")  # a directory without weights
    with pytest.raises(ValueError, match="model.attention is flash, but flash-attn needs a CUDA GPU"):
        load_model(config, for_training=True)


def test_separate_sequences_have_no_backend(tiny_llava_dir: Path) -> None:
    config = ModelConfig(path=str(tiny_llava_dir), dtype="float32", share_prefix="never", attention="flash")
    assert resolve_model(config, CPU, for_training=True).attention is None


def test_without_grouped_heads_auto_takes_flex_before_varlen(machine) -> None:
    """Where the copies of keys are as large as the queries, they cost more than flex's masks."""
    copies = replace(BF16, copies_keys=True)
    assert choose_backend("auto", copies).backend == "flash"
    machine(flash=None)
    assert choose_backend("auto", copies).backend == "flex"
    assert choose_backend("auto", replace(copies, head_size=8)).backend == "varlen"  # too small for flex


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.attention.*'flash', 'varlen', 'flex', 'sdpa'.*xformers"):
        load_config(["--model.attention", "xformers"], "test", "")


@pytest.mark.parametrize(
    ("choice", "said"), [(Choice("flash", "tested"), {"attention": "flash"}), (None, {"sequences": "separate"})]
)
def test_the_reference_store_remembers_the_backend(
    choice: Choice | None, said: dict[str, str], tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "model_fingerprint", lambda path, **fields: fields)
    monkeypatch.setattr(reference_pass, "open_or_create", lambda directory, fingerprint: None)
    model_config = AutoConfig.from_pretrained(tiny_llava_dir)
    resolved = ResolvedModel(ModelConfig(), model_config, CPU, torch.bfloat16, True, choice)
    fingerprint = reference_pass._open_store(Config(), resolved, tmp_path)
    assert {name: fingerprint.get(name) for name in ("attention", "sequences") if name in fingerprint} == said
