"""Runs with `lora.kernel` and `lora.variant`: the first step, resumption, and what is exported."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bpo.checkpoint.export import RECORD
from bpo.checkpoint.files import latest_valid
from bpo.config.training import ModelConfig
from bpo.formats.files import read_groups
from bpo.model.group_scores import GroupScorer
from bpo.model.load import resolve_model
from tests.model.levers.lora_job import EXPORTED, RUNS
from tests.sample_groups import encode_all, encoder_of, write_photos
from tests.test_train import launch
from tests.tiny import tiny_llava
from tests.trained_checkpoint import write_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    (root / "photos").mkdir()
    write_groups(root / "groups.jsonl", write_photos(root / "photos"))
    tiny_llava(root / "llava")
    result = launch([sys.executable, "-m", "tests.model.levers.lora_job", str(root)])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


def metrics(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]


def logps(root: Path, model: str) -> torch.Tensor:
    """Log-probs of the tokens of all completions, by a model or adapter directory."""
    encoder = encoder_of(root / model, root / "photos")
    scorer = GroupScorer(
        resolve_model(ModelConfig(path=str(root / model), dtype="float32"), for_training=True), encoder
    )
    encoded = encode_all(encoder, read_groups(root / "groups.jsonl"))
    return torch.cat([torch.cat(values) for _, _, values in scorer.score(enumerate(encoded), 10_000)])


@pytest.mark.parametrize("run", RUNS)
def test_the_policy_of_the_first_step_is_the_reference(root: Path, run: str) -> None:
    first, second = metrics(root, run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["loss"] < 0.69


def test_the_steps_are_those_of_peft(root: Path) -> None:
    for grouped, plain in zip(metrics(root, "grouped"), metrics(root, "plain"), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert grouped[name] == pytest.approx(plain[name], rel=1e-4), name
    assert metrics(root, "dropped")[1]["loss"] != pytest.approx(metrics(root, "plain")[1]["loss"], rel=1e-3)


def test_a_resumed_run_draws_the_same_masks(root: Path) -> None:
    resumed, unbroken = (
        load_file(latest_valid(root / run)[0] / "rank-00000.safetensors") for run in ("resumed", "dropped")
    )
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(value, unbroken[name]) for name, value in resumed.items())


@pytest.mark.parametrize("run", EXPORTED)
def test_both_forms_of_export_are_the_trained_model(root: Path, run: str) -> None:
    torch.testing.assert_close(logps(root, f"{run}-merged"), logps(root, f"{run}-adapter"), atol=3e-4, rtol=0)
    assert float((logps(root, f"{run}-adapter") - logps(root, "llava")).abs().max()) > 0.01
    for form in ("adapter", "merged"):
        compared = json.loads((root / f"{run}-{form}" / RECORD).read_text())["log_probs"]
        assert compared["survived"] == pytest.approx(1, abs=1e-3)
