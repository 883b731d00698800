"""The comparison of methods on a small world, and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.methods.__main__ import main
from benchmarks.methods.cells import (
    PUBLISHED,
    RECIPES,
    WITH_NLL,
    Comparison,
    Seed,
    columns_of,
    loss_of,
    training_config,
    with_likelihood,
)
from benchmarks.methods.report import summary, table
from bpo.losses.program import LossProgram
from bpo.tools.demo.files import World
from bpo.tools.demo.methods import MethodGroups
from bpo.tools.demo.world import WorldConfig

ROOT = Path(__file__).resolve().parents[2]


def compare(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.methods", "--quick", "--output", str(output), *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_comparison_reports_both_columns_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = compare(tmp_path)
    assert first.returncode == 0, first.stderr[-4000:]
    rows = [line.split(" | ") for line in first.stdout.splitlines() if line.startswith("| ")]
    assert {row[0] for row in rows} == {"| method", "| base", "| dpo", "| mdpo"}
    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["machine"]["commit"] and tree["machine"]["torch"] and tree["sizes"]["steps"] == 3
    dpo, mdpo = tree["methods"]["dpo"], tree["methods"]["mdpo"]
    for column in (PUBLISHED, WITH_NLL):
        assert 0 <= dpo[column]["chair_i"]["median"] <= 1 and dpo[column]["step_seconds"]["median"] > 0
        assert mdpo[column]["tokens_per_step"]["median"] > 1.2 * dpo[column]["tokens_per_step"]["median"]
    assert dpo[PUBLISHED]["reference_seconds"]["median"] > 0
    assert set(tree["methods"]["base"]) == {PUBLISHED}

    kept, missing = (tmp_path / "cells" / f"{name}.published.seed-0.json" for name in ("mdpo", "dpo"))
    other_loss = tmp_path / "cells" / "dpo.with-nll.seed-0.json"
    kept.write_text(kept.read_text().replace('"steps": 3', '"steps": 4'))
    other_loss.write_text(
        other_loss.read_text().replace('"beta": 0.1', '"beta": 0.2').replace('"steps": 3', '"steps": 4')
    )
    missing.unlink()
    second = compare(tmp_path)
    assert second.returncode == 0, second.stderr[-4000:]
    assert missing.exists() and '"steps": 4' in kept.read_text() and '"steps": 3' in other_loss.read_text()


def test_results_of_other_sizes_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sizes.json").write_text('{"steps": 93}')
    assert main(["--quick", "--output", str(tmp_path)]) == 2
    assert "it has results of other sizes; give another folder" in capsys.readouterr().err


def test_an_unknown_method_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--methods", "dpo,ppo"]) == 2
    assert "no recipe ppo; there are aot, aot-unpaired, apo-down" in capsys.readouterr().err


def test_only_methods_without_a_likelihood_of_their_own_get_one_added() -> None:
    own = {name for name in RECIPES if columns_of(name) == (PUBLISHED,)}
    assert own == {"cpo", "mpo", "opa-sft", "orpo", "sft"}
    for name in sorted(RECIPES.keys() - own):
        before, after = LossProgram(loss_of(name)), LossProgram(with_likelihood(loss_of(name), 0.7))
        assert after.names[:-1] == before.names
        (added,) = after.terms[len(before.terms) :]
        assert added.is_likelihood and (added.spec.pairs, added.options.weight) == ("chosen", 0.7)


def test_every_method_has_the_demos_optimisation_and_its_own_loss(tmp_path: Path) -> None:
    groups = MethodGroups(**{name: tmp_path / name for name in ("shared", "difficulty", "corrected", "started")})
    paths = dict.fromkeys(("root", "annotations", "images", "instances", "captions", "synonyms", "suite"), tmp_path)
    seed = Seed(3, tmp_path, World(**paths, config=WorldConfig(), pope={}), groups)
    config = training_config(Comparison(), seed, "opa-dpo", WITH_NLL, tmp_path / "after-sft")
    assert (config.train.lr, config.train.max_steps, config.train.seed) == (5e-4, 93, 3)
    assert config.train.weight_decay == 0 and config.trainable.language == "full"
    assert config.model.path == str(tmp_path / "after-sft") and config.data.groups == str(groups.corrected)
    assert [term.weight for term in config.loss.terms] == [1.0, 0.2, 1.0, 1.0]
    assert training_config(Comparison(), seed, "ddpo", PUBLISHED, tmp_path).train.completion_types == ["llm-hal"]


def cell(method: str, seed: int, rate: float, column: str = PUBLISHED, **more: object) -> dict:
    figures = {"chair_i": rate, "chair_s": 2 * rate, "recall": 0.9}
    return {"method": method, "column": column, "seed": seed, **figures, **more}


def test_the_report_has_medians_with_ranges_and_names_divergence() -> None:
    cells = [cell("base", 0, 0.2), cell("base", 1, 0.2), cell("base", 2, 0.2)]
    cells += [cell("ipo", 0, 0.001), cell("ipo", 0, 0.03, WITH_NLL)]  # without likelihood: few objects of any kind
    cells += [cell("dpo", seed, rate, step_seconds=0.25) for seed, rate in enumerate((0.05, 0.02, 0.04))]
    cells += [{"method": "dpo", "column": WITH_NLL, "seed": seed, "failed": "not finite"} for seed in range(3)]
    cells += [cell("orpo", 0, 0.01), {"method": "orpo", "column": PUBLISHED, "seed": 1, "failed": "not finite"}]
    found = summary(cells)
    assert found["dpo"][PUBLISHED]["chair_i"] == {"median": 0.04, "least": 0.02, "most": 0.05}
    assert (found["orpo"][PUBLISHED]["failed"], found["dpo"][WITH_NLL]["failed"]) == (1, 3)
    rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in table(found).splitlines()[2:]]
    assert [row[0] for row in rows] == ["orpo", "ipo", "base", "dpo"]
    assert rows[3][1:7] == ["4.0 (2.0 to 5.0)", "8.0 (4.0 to 10.0)", "90.0", *["diverged"] * 3]
    assert rows[0][1] == "1.0, 1 diverged"
    assert rows[0][4] == "as published" and rows[2][4] == "-" and rows[3][8] == "0.250"
