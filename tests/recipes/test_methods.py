"""Every recipe of bpo/recipes/methods/ trains two steps end to end on the demo's world."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bpo.config.io import load_config, read_yaml
from bpo.losses.program import LossProgram

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "bpo" / "recipes" / "methods").glob("*.yaml"))}
LOG2 = math.log(2)
# The loss of the first step, at policy = reference, where it does not depend on the model.
FIRST_LOSS = {
    **dict.fromkeys("aot aot-unpaired bpo cdpo da-dpo ddpo dpo f-dpo-alpha f-dpo-forward-kl f-dpo-js".split(), LOG2),
    **dict.fromkeys("ld-dpo povid-1 povid-2 povid-2-shared robust rpo rpo-diagonal".split(), LOG2),
    **dict.fromkeys("selm sentinel sigmoid-norm spa token-weights".split(), LOG2),
    **dict.fromkeys("bco-pair nca-pair".split(), 2 * LOG2),
    **dict.fromkeys("apo-down apo-zero hinge".split(), 1.0),
    "discopop": 0.5 * LOG2 + 0.5,
    "exo-pair": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "ipo": 25.0,
    "ipo-sum": 25.0,
    "mdpo": 3 * LOG2,
    "sppo-hard": 50.0,
    "symmpo": 4 * LOG2,
}
FIRST_TERMS = {
    "mpo": {"preference": LOG2, "quality": 2 * LOG2},
    "povid-2": {"text": LOG2, "noise": LOG2},
    "selm": {"sigmoid": LOG2, "optimism": 0.0},
    "sena": {"sigmoid": LOG2},
    "symmpo": {"text": LOG2, "symmetric": 2 * LOG2, "anchor": LOG2, "other_anchor": LOG2, "consistency": 0.0},
}
# Packed tokens of a step: more for each changed image than the same data without; equal where tokens are shared.
SAME_DATA = {
    "mdpo": "dpo",
    "opa-dpo": "opa-sft",
    "povid-2": "povid-1",
    "povid-2-shared": "povid-1",
    "sena": "bpo",
    "symmpo": "dpo",
    "vdpo": "dpo",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.recipes.train_methods", str(root)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return root


def metrics(root: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def tokens(root: Path, name: str) -> int:
    return sum(round(step["tokens_per_second"] * step["step_seconds"]) for step in metrics(root, name))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_trains_and_logs_its_terms(trained: Path, name: str) -> None:
    """The run itself compares the first loss with its value for policy = reference."""
    steps, found = metrics(trained, name), json.loads((trained / "found.json").read_text())[name]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert steps[0]["loss"] != steps[1]["loss"]
    assert found["change"] > 1e-4
    logged = {key.removeprefix("loss/") for key in steps[0] if key.startswith("loss/")}
    assert logged == (set(found["terms"]) if len(found["terms"]) > 1 else set())


@pytest.mark.parametrize("name", FIRST_LOSS)
def test_the_first_loss_is_that_of_the_equation(trained: Path, name: str) -> None:
    assert metrics(trained, name)[0]["loss"] == pytest.approx(FIRST_LOSS[name], rel=1e-5)


@pytest.mark.parametrize("name", FIRST_TERMS)
def test_terms_are_logged_before_their_weights(trained: Path, name: str) -> None:
    first = metrics(trained, name)[0]
    for term, value in FIRST_TERMS[name].items():
        assert first[f"loss/{term}"] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_selms_term_is_on_the_demos_own_answers_which_move_away_from_the_reference(trained: Path) -> None:
    assert metrics(trained, "selm")[1]["loss/optimism"] != 0


@pytest.mark.parametrize("name", SAME_DATA)
def test_another_image_costs_tokens_unless_its_tokens_are_shared(trained: Path, name: str) -> None:
    more, same = tokens(trained, name), tokens(trained, SAME_DATA[name])
    assert more == same if name == "povid-2-shared" else more > 1.2 * same


def test_methods_without_a_reference_compute_none(trained: Path) -> None:
    without = {name for name in RECIPES if not (trained / "runs" / name / "reference").exists()}
    assert without == {"cpo", "opa-sft", "orpo", "sft", "simpo"}


def test_likelihoods_of_orpo_cpo_and_fine_tuning_are_the_same(trained: Path) -> None:
    first = {name: metrics(trained, name)[0] for name in ("orpo", "cpo", "sft")}
    assert first["orpo"]["loss/nll"] == first["cpo"]["loss/nll"] == pytest.approx(first["sft"]["loss"], rel=1e-4)
    assert first["orpo"]["loss"] == pytest.approx(first["orpo"]["loss/nll"] + 0.1 * first["orpo"]["loss/orpo"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_says_what_it_is_of_and_has_its_own_output(name: str) -> None:
    comment = [line for line in RECIPES[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = " ".join(line.removeprefix("# ") for line in comment)
    method, rest = text.split(" Data: ")
    assert "arXiv " in method and all(part for part in rest.split(" Differences: ")) and " Differences: " in rest
    assert read_yaml(RECIPES[name])["train"]["output_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", ["dpo", "mdpo", "opa-dpo", "orpo"])
def test_a_method_follows_the_recipe_of_a_model(name: str) -> None:
    model = str(ROOT / "bpo" / "recipes" / "llava-1.5-7b.yaml")
    config = load_config(["--config", model, "--config", str(RECIPES[name])])
    assert config.loss == load_config(["--config", str(RECIPES[name])]).loss
    assert config.train.output_dir == f"runs/{name}"
    assert (config.model.path, config.data.image_aspect) == ("llava-hf/llava-1.5-7b-hf", "pad")
    assert config.lora.r == {"mdpo": 64, "opa-dpo": 256}.get(name, 32)
    assert LossProgram(config.loss).names
