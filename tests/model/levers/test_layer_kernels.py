"""Liger's layer kernels: values, gradients, and that nothing but the model itself changes.

    TRITON_INTERPRET=1 pytest tests/model/levers/test_layer_kernels.py      (with Liger itself, if it is installed)

Otherwise with the stand-in of tests/liger_stand_in.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig
from bpo.data.families import FAMILIES, family_of
from bpo.model import recompute
from bpo.model.levers import layer_kernels
from bpo.model.levers.choice import Lever
from bpo.model.load import load_model, resolve_model
from tests import liger_stand_in
from tests.sample_groups import encoder_of, group, packed_batch
from tests.trained_policy import Trained, assert_equal_to_rounding, policy_of, trained

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REQUESTED = Lever("liger", "")


@pytest.fixture(autouse=True)
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        liger_stand_in.use_interpreter(monkeypatch)
    else:
        liger_stand_in.use_stand_in(monkeypatch)


def options(directory: Path, dtype: Any = "float32", **model: Any) -> Config:
    adapter = LoraConfig(r=2, alpha=64, dropout=0.4)
    return Config(model=ModelConfig(path=str(directory), dtype=dtype, **model), lora=adapter)


def language_model(directory: Path) -> tuple[torch.nn.Module, Callable[[], str]]:
    model = load_model(ModelConfig(path=str(directory), dtype="float32"))
    family = family_of(model.config)
    install = lambda: layer_kernels.install(model, family, Config(), REQUESTED)  # noqa: E731
    return model.get_submodule(family.language_module).train(), install


def run(text: torch.nn.Module) -> Trained:
    text.zero_grad()
    generator = torch.Generator().manual_seed(0)
    embeds_BTD, weight_BTD = torch.randn(2, 1, 5, 32, generator=generator)
    embeds_BTD.requires_grad_()
    hidden_BTD = text(inputs_embeds=embeds_BTD).last_hidden_state
    (hidden_BTD * weight_BTD).sum().backward()
    gradients = {name: p.grad.clone() for name, p in text.named_parameters() if p.grad is not None}
    return Trained(hidden_BTD.detach(), gradients | {"embeds": embeds_BTD.grad})  # type: ignore[operator]


PATCHED = {
    "gemma3": "19 RMSNorm, 3 rotary embedding, 3 GeGLU",
    "qwen3_vl": "3 residual and norm, 3 rotary embedding, 13 RMSNorm, 3 SwiGLU",
    "qwen3_vl_moe": "3 residual and norm, 3 rotary embedding, 13 RMSNorm",
}


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_the_language_model_computes_the_same(family_dir, family_name: str) -> None:
    text, install = language_model(family_dir(family_name))
    names = list(text.state_dict())
    expected = run(text)
    done = install()
    usual = "2 residual and norm, 2 rotary embedding, 2 SwiGLU, 5 RMSNorm"
    assert sorted(done.split(", ")) == sorted(PATCHED.get(family_name, usual).split(", "))
    assert_equal_to_rounding(run(text), expected, 2e-5)
    assert list(text.state_dict()) == names


# Without an adapter, the queries that are rotated in place are results of products, which `selective` records.
@pytest.mark.parametrize(
    ("family_name", "language"),
    [("gemma3", "full"), ("llava", "full"), ("llava", "lora"), ("qwen2_5_vl", "full"), ("qwen3_vl", "lora")],
)
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_policy_learns_the_same(family_dir, photo_root, monkeypatch, family_name, language, mode) -> None:
    """With the dropout of an adapter. In double precision, where possible: so only the function matters."""
    dtype, tolerance = (torch.float32, 2e-3) if INTERPRETED else (torch.float64, 1e-5)
    monkeypatch.setattr(recompute, "CHEAP_INNER", 2)  # the tiny products count as large
    directory = family_dir(family_name)
    encoder = encoder_of(directory, photo_root)
    batch = packed_batch(encoder, [group("a", "a cat", "a dog")])
    plain, config = options(directory), options(directory, gradient_checkpointing=mode)
    plain.trainable.language = config.trainable.language = language
    expected = trained(policy_of(plain, encoder.family, lambda model: model.to(dtype)), batch)

    def install(model: Any) -> None:
        layer_kernels.install(model.to(dtype), encoder.family, config, REQUESTED)

    assert_equal_to_rounding(trained(policy_of(config, encoder.family, install), batch), expected, tolerance)


def test_the_same_answers_and_another_model_is_untouched(tiny_llava_dir: Path) -> None:
    one, other = (load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32")) for _ in range(2))
    plain = repr(one)
    layer_kernels.install(one, family_of(one.config), Config(), REQUESTED)
    assert repr(one) == repr(other) == plain, "classes keep their names"
    classes = [{type(module) for module in model.model.language_model.modules()} for model in (one, other)]
    assert all(cls.__module__.startswith(("transformers.", "torch.")) for cls in classes[1])
    assert len(classes[0] - classes[1]) == 4
    asked = {"input_ids": torch.arange(5)[None] + 40, "max_new_tokens": 6, "do_sample": False}
    answers = [model.eval().generate(**asked) for model in (one, other)]
    assert torch.equal(*answers) and answers[0].shape == (1, 11)


def test_a_second_backward_pass_over_a_graph_is_an_error(tiny_llava_dir: Path) -> None:
    """It would read gradients in place of activations."""
    text, install = language_model(tiny_llava_dir)
    install()
    total = text(inputs_embeds=torch.ones(1, 3, 32)).last_hidden_state.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        total.backward()


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_rotary_tables_are_made_once_per_forward_pass(family_dir, family_name: str) -> None:
    """Not per layer, and with the channels of multimodal positions already merged."""
    text, _ = language_model(family_dir(family_name))
    tables: list[torch.Tensor] = []
    text.rotary_emb.register_forward_hook(lambda module, args, output: tables.extend(output))
    text(inputs_embeds=torch.ones(1, 3, 32))
    kinds_of_layers = set(getattr(text.config, "layer_types", None) or ["all"])
    kinds = len(kinds_of_layers) if "gemma" in family_name else 1
    assert [table.shape for table in tables] == [(1, 3, 8)] * 2 * kinds


def resolved(config: Config, device: str) -> Any:
    return SimpleNamespace(config=resolve_model(config.model).config, device=torch.device(device))


def test_it_is_selected_on_request_only(tiny_llava_dir: Path, monkeypatch) -> None:
    config = options(tiny_llava_dir)
    for device in ("cuda", "cpu"):
        assert layer_kernels.choose(config, resolved(config, device)).value == "none"
    requested = options(tiny_llava_dir, layer_kernels="liger")
    assert layer_kernels.choose(requested, resolved(requested, "cuda")).value == "liger"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert layer_kernels.choose(config, resolved(config, "cuda")) == ("none", "liger_kernel is not installed")


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_every_family_is_known(family_dir, family_name: str) -> None:
    config = options(family_dir(family_name), layer_kernels="liger")
    assert layer_kernels.choose(config, resolved(config, "cuda")).value == "liger"


def test_a_request_that_cannot_be_met_names_the_fix(tiny_llava_dir: Path, monkeypatch) -> None:
    config = options(tiny_llava_dir, layer_kernels="liger")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="liger, but Liger needs a GPU, and the device is cpu; train on a GPU"):
        layer_kernels.choose(config, resolved(config, "cpu"))
    on_gpu = resolved(config, "cuda")
    on_gpu.config.text_config.model_type = "phi3"
    with pytest.raises(ValueError, match="no layers of `phi3` are known to equal Liger's; set it to none"):
        layer_kernels.choose(config, on_gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"liger_kernel is not installed; pip install 'bpo\[fast\]'"):
        layer_kernels.choose(config, resolved(config, "cuda"))


@pytest.mark.skipif(INTERPRETED, reason="these tests run on Liger already")
def test_liger_itself_computes_the_same(monkeypatch) -> None:
    """In Triton's interpreter, in a process of its own: Triton decides when it is imported whether it interprets."""
    monkeypatch.delitem(sys.modules, "liger_kernel")  # the stand-in
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")
    chosen = "computes_the_same and (gemma3 or llava_next or qwen3_vl) and not moe"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "\n3 passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]
