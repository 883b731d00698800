"""The demo's whole chain with a few steps of everything: world to report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bpo.formats.files import read_groups
from bpo.tools.demo import run
from bpo.tools.demo.base import BaseConfig
from bpo.tools.demo.environment import quiet_libraries
from bpo.tools.demo.recipe import VARIANTS, Recipe
from bpo.tools.demo.report import METRICS


class Brief(Recipe):
    def base(self, seed: int) -> BaseConfig:
        return BaseConfig(seed=seed, tower_steps=20, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_chain_ends_with_figures_a_table_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Brief(num_annotations=48, num_evaluation_scenes=12, steps=2, groups_per_step=8, num_ranks=1)
    monkeypatch.setattr(run, "VARIANTS", tuple(v for v in VARIANTS if v.name in ("sft", "bpo")))
    quiet_libraries()
    results = [run.run_seed(tmp_path / "seed-0", 0, recipe)]
    run.write_outputs(tmp_path, results, recipe, {"python": "3"})

    tree = json.loads((tmp_path / "metrics.json").read_text())
    assert set(tree) == {"base", "sft", "bpo", "seconds", "versions", "seeds"}
    assert all(set(tree[name]) == set(METRICS) for name in ("base", "sft", "bpo"))
    assert {"world", "base", "bootstrap", "measure", "train_bpo", "evaluate_bpo"} <= set(tree["seconds"])
    measured = tree["seeds"]["0"]["measures"]
    assert {"swap", "mllm-hal", "llm-hal"} <= set(measured)
    assert 0 <= measured["swap"]["text_accuracy"] <= 1 and 0 <= measured["swap"]["blind_share_above_zero"] <= 1
    groups = list(read_groups(tmp_path / "seed-0" / "groups.jsonl"))
    swapped = Counter(c.response for group in groups for c in group.completions if c.type == "swap")
    chosen = [group.completions[0].response for group in groups if any(c.type == "swap" for c in group.completions)]
    assert swapped == Counter(chosen)  # each text is as often rejected as chosen
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 6 and "Before and after" in html
    assert "Measures of the rejected answers" in html and "<h3>swap" in html
    table = run.format_table(results)
    assert [line.split()[0] for line in table.splitlines()] == ["chair_i", "base", "sft", "bpo"]
    assert "training BPO" in capsys.readouterr().out
    first = json.loads((tmp_path / "seed-0" / "bpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["preference_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_number_of_seeds_below_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--seeds is 0"):
        run.main(["--seeds", "0", "--output", str(tmp_path)])
