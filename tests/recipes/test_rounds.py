"""Every recipe of bpo/recipes/rounds/ runs two rounds on the demo's world, each with the policy of the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bpo.formats.files import read_groups
from bpo.model.weights import policy_fingerprint
from bpo.ranking.judgements import read_judgements
from bpo.records import PreferenceGroup
from bpo.rounds.status import status_table
from tests.recipes.run_rounds import EVALUATED

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "bpo" / "recipes" / "rounds").glob("*.yaml"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.recipes.run_rounds", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=560
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return folder


def folder_of(root: Path, method: str, number: int) -> Path:
    return root / "runs" / method / f"round-{number}"


def groups_of(root: Path, method: str, number: int, name: str = "groups") -> list[PreferenceGroup]:
    return list(read_groups(folder_of(root, method, number) / f"{name}.jsonl"))


def metrics_of(root: Path, method: str, number: int) -> list[dict[str, float]]:
    lines = (folder_of(root, method, number) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def judged(root: Path, method: str, number: int) -> list[tuple[PreferenceGroup, Any]]:
    found = read_judgements(folder_of(root, method, number) / "judgements")
    return [(group, found.of(group)) for group in groups_of(root, method, number, "candidates")]


@pytest.mark.parametrize("method", RECIPES)
def test_two_rounds_train_two_policies(root: Path, method: str) -> None:
    assert [len(metrics_of(root, method, number)) for number in (1, 2)] == [3, 3]
    policies = [root / "base", *(folder_of(root, method, number) / "policy" for number in (1, 2))]
    assert len({policy_fingerprint(str(policy)) for policy in policies}) == 3
    assert "waiting" not in status_table(root / "runs" / method)


@pytest.mark.parametrize("method", EVALUATED)
def test_each_rounds_policy_is_evaluated(root: Path, method: str) -> None:
    table = status_table(root / "runs" / method).splitlines()
    for number in (1, 2):
        results = json.loads((folder_of(root, method, number) / "results.json").read_text())
        assert {"chair/chair_i", "chair/recall"} <= results["metrics"].keys()
    assert [line.split()[0] for line in table[-3:]] == ["round", "1", "2"]


@pytest.mark.parametrize("method", [name for name in RECIPES if name != "sapo"])
def test_answers_of_the_second_round_are_of_the_first_rounds_policy(root: Path, method: str) -> None:
    for number in (1, 2):
        policy = root / "base" if number == 1 else folder_of(root, method, 1) / "policy"
        made = [c.provenance for group in groups_of(root, method, number, "candidates") for c in group.completions]
        found = {origin.policy for origin in made if origin is not None and origin.source != "annotation"}
        assert found == {policy_fingerprint(str(policy))}
    if method != "pds-dpo":  # its single round has all annotations
        ids = [{group.id for group in groups_of(root, method, number, "candidates")} for number in (1, 2)]
        assert ids[0] and ids[1] and not ids[0] & ids[1]


def test_iterated_bpo_has_negatives_of_both_sources(root: Path) -> None:
    types = {
        c.type for number in (1, 2) for group in groups_of(root, "iterated-bpo", number) for c in group.completions
    }
    assert types == {"gt", "mllm-hal", "llm-hal"}


def test_sapo_makes_its_negatives_while_it_trains(root: Path) -> None:
    for number in (1, 2):
        steps = metrics_of(root, "sapo", number)
        assert all(step["online/negatives"] + step["online/refused"] > 0 for step in steps)
        assert steps[-1]["online/buffer"] > steps[0]["online/buffer"]
        assert not (folder_of(root, "sapo", number) / "candidates.jsonl").exists()


def test_selm_is_optimistic_about_the_policys_own_greedy_answer(root: Path) -> None:
    for number in (1, 2):
        for group in groups_of(root, "selm", number):
            assert {c.type for c in group.completions if c.explored} <= {"mllm-greedy"}
            assert any(c.explored for c in group.completions)
        assert metrics_of(root, "selm", number)[0]["loss/optimism"] == pytest.approx(0, abs=1e-6)
        assert metrics_of(root, "selm", number)[-1]["loss/optimism"] != 0


def test_spa_labels_by_its_own_log_ratio_to_the_first_model(root: Path) -> None:
    assert not (folder_of(root, "spa", 1) / "judgements").exists()
    for group, judgement in judged(root, "spa", 2):
        for score, detail in zip(judgement.scored.scores, judgement.scored.details, strict=True):
            assert score == pytest.approx(0.5 * (detail["logp_policy"] - detail["logp_reference"]))
        assert judgement.judge["name"] == "implicit" and len(group.completions) >= 2
    assert all(c.type == "mllm-sample" for group in groups_of(root, "spa", 2) for c in group.completions)


def test_rlaif_v_prefers_answers_with_fewer_rejected_claims(root: Path) -> None:
    for number in (1, 2):
        for group in groups_of(root, "rlaif-v", number):
            rejected = {c.score: c.extra["judgement"]["details"]["rejected"] for c in group.completions}
            assert rejected[1] < rejected[0]
            assert {c.type for c in group.completions} == {"mllm-sample"}


def test_chair_dpo_prefers_answers_with_fewer_wrong_objects(root: Path) -> None:
    present = {
        entry["image"]: set(entry["objects"])
        for entry in map(json.loads, (root / "world" / "detections.jsonl").read_text().splitlines())
    }
    for number in (1, 2):
        for group in groups_of(root, "chair-dpo", number):
            best, worst = sorted(group.completions, key=lambda c: -c.score)
            wrong = [c.extra["judgement"]["details"]["hallucinated"] for c in (best, worst)]
            assert len(wrong[1]) > 0
            assert not {name for names in wrong for name in names} & present[group.images[0]]


def test_a_verifier_keeps_clean_answers_and_weighs_wrong_sentences(root: Path) -> None:
    for number in (1, 2):
        for group in groups_of(root, "finesumfact", number):
            for c in group.completions:
                assert (c.token_weights != ()) == (c.score == 0)
                assert all(weight == 5.0 for _, _, weight in c.token_weights)


def test_pds_dpo_takes_the_image_that_the_program_prefers(root: Path) -> None:
    chosen = [json.loads(line) for line in (root / "runs" / "pds-dpo" / "annotations.jsonl").read_text().splitlines()]
    given = {entry["id"]: entry for entry in json.loads((root / "candidates.json").read_text())}
    assert len(chosen) == len(given)
    for entry in chosen:
        images = given[entry["id"]].get("candidate_images")
        assert entry["images"] == ([images[1]] if images else [given[entry["id"]]["image"]])
