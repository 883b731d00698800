"""The grid of sampling settings: which one is chosen and on which units it is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from bpo.config.decoding import GridConfig, SamplingConfig
from bpo.config.training import Config, DataConfig, EvaluationConfig, ModelConfig
from bpo.evaluation.benchmark import Benchmark, Sums, ratio
from bpo.evaluation.grid import BASE, GridResult, choose_setting, settings_of
from bpo.evaluation.intervals import UnitCounts
from bpo.evaluation.run import run_evaluation


class Rates:
    """A stand-in for a benchmark: `rate` is the headline."""

    name = "rates"

    def __init__(self, *lower: str):
        self.lower_is_better = frozenset(lower)

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {"rate": ratio(sums["hits"], sums["asked"]), "other": -ratio(sums["hits"], sums["asked"])}


def counts(hits: list[int]) -> UnitCounts:
    return UnitCounts(
        tuple(f"{n:03d}" for n in range(len(hits))), ("hits", "asked"), np.array([[float(hit), 1.0] for hit in hits])
    )


def choose(settings: dict[str, UnitCounts], *lower: str) -> GridResult:
    return choose_setting(cast(Benchmark, Rates(*lower)), settings)


def halves(num_units: int) -> tuple[list[int], list[int]]:
    """Which units choose and which report, found from settings that hit one unit each."""
    choosing = []
    for n in range(num_units):
        settings = {BASE: counts([0] * num_units), "x": counts([int(m == n) for m in range(num_units)])}
        if choose(settings).chosen == "x":
            choosing.append(n)
    return choosing, [n for n in range(num_units) if n not in choosing]


def test_settings_change_one_option_of_sampling_each() -> None:
    options = EvaluationConfig(
        sampling=SamplingConfig(seed=3), grid=GridConfig(temperature=[0.2], top_p=[0.4, 0.9], top_k=[5])
    )
    assert settings_of(options) == {
        "temperature=0.2": SamplingConfig(temperature=0.2, seed=3),
        "top_p=0.4": SamplingConfig(temperature=1.0, top_p=0.4, seed=3),
        "top_p=0.9": SamplingConfig(temperature=1.0, top_p=0.9, seed=3),
        "top_k=5": SamplingConfig(temperature=1.0, top_k=5, seed=3),
    }
    with pytest.raises(ValueError, match=r"evaluation.grid.top_p\[0\] is 0.0; it must be in \(0, 1\]"):
        GridConfig(top_p=[0.0])


def test_a_setting_is_reported_on_units_that_did_not_choose_it() -> None:
    choosing, reporting = halves(8)
    assert len(choosing) == len(reporting) == 4
    lucky = [int(n in choosing) for n in range(8)]  # perfect where it is chosen, worthless elsewhere
    steady = [int(n in [*choosing[:2], *reporting]) for n in range(8)]
    result = choose({BASE: counts([1, 0] * 4), "lucky": counts(lucky), "steady": counts(steady)})
    assert (result.metric, result.chosen, result.choosing, result.reported) == ("rate", "lucky", 1.0, 0.0)
    assert result.base == sum([1, 0][n % 2] for n in reporting) / 4
    assert (result.oracle, result.values["steady"]) == ("steady", 0.75)
    assert "rate 0.0000 with lucky" in str(result) and "oracle: 0.7500 with steady" in str(result)
    assert result.to_json()["oracle_value"] == 0.75


def test_the_lowest_rate_is_best_where_lower_is_better() -> None:
    settings = {BASE: counts([1, 1, 0, 1]), "low": counts([0, 0, 0, 0]), "high": counts([1, 1, 1, 1])}
    assert choose(settings, "rate").chosen == "low"
    assert choose(settings).oracle == "high"


def config_of(root: Path, model: Path, **options: Any) -> Config:
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (60 * number, 90, 40)).save(root / name)
    lines = [{"question_id": n, "image": name, "text": "A dog?", "label": "no"} for n, name in enumerate(names)]
    (root / "pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(image_root=str(root)),
        evaluation=EvaluationConfig(
            output=str(root / "results.json"),
            pope_questions=[str(root / "pope_random.json")],
            max_new_tokens=3,
            batch_size=4,
            **options,
        ),
    )


def test_a_run_has_the_base_and_the_grid(
    tmp_path: Path, tiny_llava_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = GridConfig(temperature=[0.2, 2.0], top_p=[], top_k=[3])
    config = config_of(tmp_path, tiny_llava_dir, decoding="grid", grid=grid)
    found = run_evaluation(config, progress=False)
    assert "oracle:" in capsys.readouterr().out
    (of_pope,) = found["grid"]
    assert set(of_pope["values"]) == {BASE, "temperature=0.2", "temperature=2", "top_k=3"}
    assert found["cost"]["branches"]["image"]["prefills"] == 4 * 4
    plain = run_evaluation(replace(config, evaluation=replace(config.evaluation, decoding="plain")), progress=False)
    assert found["metrics"] == plain["metrics"]
    assert of_pope["values"][BASE] == plain["metrics"][f"pope/{of_pope['metric']}"]
