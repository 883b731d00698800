"""Training continues an adapter, against its own or another model's reference; adapters that do not fit are refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bpo.checkpoint.export import RECORD
from bpo.checkpoint.files import finished_step, latest_valid
from bpo.config.training import Config, ModelConfig
from bpo.data.families import family_of
from bpo.formats.files import read_groups
from bpo.model.group_scores import GroupScorer
from bpo.model.inference import load_for_inference
from bpo.model.load import load_base, load_model, resolve_model
from bpo.model.trainable import prepare_trainable
from tests.sample_groups import encode_all, encoder_of, turn, write_photos
from tests.test_train import launch
from tests.tiny import tiny_llava
from tests.trained_checkpoint import write_groups
from tests.training.policy_job import config_of

# Of log-probs in fp32, of two ways to add the adapter.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policies")
    (root / "photos").mkdir()
    write_groups(root / "groups.jsonl", write_photos(root / "photos"))
    tiny_llava(root / "llava")
    result = launch([sys.executable, "-m", "tests.training.policy_job", str(root)])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


def metrics(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]


@cache
def tokens(root: Path, model: str) -> list[list[torch.Tensor]]:
    """Log-probs of the tokens of each completion of each group, by a model or adapter directory."""
    options = ModelConfig(path=str(root / model), dtype="float32")
    encoder = encoder_of(root / model, root / "photos")
    scorer = GroupScorer(resolve_model(options, for_training=True), encoder)
    encoded = encode_all(encoder, read_groups(root / "groups.jsonl"))
    return [values for _, _, values in scorer.score(enumerate(encoded), 10_000)]


def pairs(root: Path, model: str) -> list[tuple[float, float]]:
    """Log-probs of both answers of each pair: the first answer of a group is preferred to its others."""
    sums = [[float(values_N.sum()) for values_N in group] for group in tokens(root, model)]
    return [(group[0], other) for group in sums for other in group[1:]]


def state(root: Path, run: str) -> dict[str, bytes]:
    """The weights and the optimizer's state of the latest checkpoint."""
    tensors = load_file(latest_valid(root / run)[0] / "rank-00000.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("run", ["second", "partitioned"])
def test_training_starts_from_the_adapter_which_is_its_reference(runs: Path, run: str) -> None:
    first, second = metrics(runs, run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["loss"] < 0.65
    assert first["loss"] == metrics(runs, "first")[0]["loss"]
    chosen, rejected = zip(*pairs(runs, "adapter"), strict=True)
    assert first["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-4)
    assert first["logps/rejected"] == pytest.approx(sum(rejected) / len(rejected), abs=1e-4)
    assert second["loss"] == pytest.approx(metrics(runs, "second")[1]["loss"], abs=1e-6)


def test_a_resumed_run_repeats_the_unbroken_one(runs: Path) -> None:
    assert state(runs, "resumed") == state(runs, "second") != state(runs, "first")
    assert finished_step(runs / "second") == (2, 2)
    base = latest_valid(runs / "second")[1]["base"]
    assert {"adapter/adapter_model.safetensors", "model.safetensors"} <= base.keys()


def test_exports_are_of_the_base_and_the_continued_adapter(runs: Path) -> None:
    settings = json.loads((runs / "second-adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(runs / "llava")
    before, adapter, merged = (
        torch.cat([values_N for group in tokens(runs, model) for values_N in group])
        for model in ("adapter", "second-adapter", "second-merged")
    )
    torch.testing.assert_close(merged, adapter, atol=3e-4, rtol=0)
    for form in ("adapter", "merged"):
        compared = json.loads((runs / f"second-{form}" / RECORD).read_text())["log_probs"]
        # What the run changed, not what it and the one before it did.
        assert compared["mean_change"] == pytest.approx(float((adapter - before).abs().mean()), rel=1e-3)
        assert compared["survived"] == pytest.approx(1, abs=1e-3)
        assert "| adapter that training continued | `adapter` |" in (runs / f"second-{form}" / "README.md").read_text()


def test_the_reference_is_another_model_whose_log_probs_are_in_the_store(runs: Path) -> None:
    beta = Config().loss.beta
    margins = [
        beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
        for (chosen, rejected), (reference_chosen, reference_rejected) in zip(
            pairs(runs, "adapter"), pairs(runs, "llava"), strict=True
        )
    ]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    (first,) = metrics(runs, "third")
    assert first["loss"] == pytest.approx(expected, abs=1e-5) and abs(expected - math.log(2)) > 0.1
    manifest = latest_valid(runs / "third")[1]
    assert manifest["base"] == latest_valid(runs / "second")[1]["base"]  # of model.path, not of the reference
    assert manifest["fingerprints"]["reference"] != latest_valid(runs / "second")[1]["fingerprints"]["reference"]


def test_runs_that_cannot_start_say_what_to_do(runs: Path) -> None:
    errors = json.loads((runs / "errors.json").read_text())
    base = runs / "llava"
    assert f"lacks 3 of 3 groups of train.reference_model {base}" in errors["incomplete"]
    assert f"--model.path {base} --train.reference_only true" in errors["incomplete"]
    assert errors["loss"] == "train.reference_only is set, but the loss has no reference; remove it"
    assert "adapter with lora.r=4, but lora.r is 8" in errors["rank"]
    assert errors["checkpoints"] == "[]"  # of the run with reference_only, in the output_dir of the one after it


@torch.no_grad()
def test_the_policy_before_its_first_step_is_the_model_of_inference(runs: Path) -> None:
    config = config_of(runs, "", "adapter")
    policy = load_base(resolve_model(config.model))
    prepare_trainable(policy, family_of(policy.config), config)
    encoder = encoder_of(runs / "adapter", runs / "photos")
    prompt = encoder.encode_prompt("r", ["tall.png"], [turn(None, "What is this?")])
    inputs = {"input_ids": torch.tensor(prompt.prefix_ids)[None], **prompt.image_inputs}
    logits = [model(**inputs).logits for model in (policy.eval(), load_for_inference(config.model))]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
    base = load_model(replace(config.model, path=str(runs / "llava")))(**inputs).logits
    assert float((base - logits[0]).abs().max()) > 1e-2


def changed(runs: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(runs / "adapter", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("section", "option", "value", "settings", "message"),
    [
        ("lora", "alpha", 16, {}, "adapter with lora.alpha=8, but lora.alpha is 16"),
        ("lora", "target", ["q_proj"], {}, "adapts .*q_proj, .*, lora.target adapts q_proj; .* in the adapter, absent"),
        ("trainable", "projector", "frozen", {}, "trainable.projector=full, but trainable.projector is frozen"),
        ("trainable", "language", "full", {}, "trainable.language=lora, but trainable.language is full"),
        ("lora", "r", 4, {"use_dora": True}, "adapter with lora.variant=dora, but lora.variant is lora"),
        ("lora", "r", 4, {"bias": "all"}, "has bias=all, which training cannot continue"),
    ],
)
def test_an_adapter_that_does_not_fit_the_options_is_refused(
    runs: Path, tmp_path: Path, section: str, option: str, value: Any, settings: dict[str, Any], message: str
) -> None:
    config = config_of(runs, "", str(changed(runs, tmp_path / "a", **settings)))
    setattr(getattr(config, section), option, value)
    model = load_base(resolve_model(config.model))
    with pytest.raises(ValueError, match=message):
        prepare_trainable(model, family_of(model.config), config)


def test_weights_that_are_damaged_or_of_another_model_are_refused(runs: Path, tmp_path: Path) -> None:
    config = config_of(runs, "", str(changed(runs, tmp_path / "a")))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    stored = load_file(weights)
    name = next(name for name in stored if "projector" in name)
    save_file({**stored, name: stored[name][:-1].clone()}, weights)
    model = load_base(resolve_model(config.model))
    with pytest.raises(ValueError, match=rf"{name.removeprefix('base_model.model.')} has the shape"):
        prepare_trainable(model, family_of(model.config), config)
    weights.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read .*export the adapter again"):
        prepare_trainable(load_base(resolve_model(config.model)), family_of(model.config), config)
