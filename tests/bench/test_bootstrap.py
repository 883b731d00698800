"""bpo bench bootstrap on a tiny world. Run: python -m pytest tests/bench/test_bootstrap.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.bench import bootstrap
from bpo.demo.files import World, build_world
from bpo.demo.recipe import Recipe


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path / "world", Recipe(num_annotations=4, num_evaluation_scenes=4).world(0), progress=False)


def test_sides_take_turns_and_ratios_are_round_by_round(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of whole jobs: a tenth of a second a batch, and groups that do not depend on it."""
    sizes: list[int] = []

    def run_once(config):
        sizes.append(config.bootstrap.batch_size)
        return 0.1 * -(-config.bootstrap.limit // config.bootstrap.batch_size), "groups"

    monkeypatch.setattr(bootstrap, "run_once", run_once)
    result = bootstrap.measure(tmp_path, world, "weaken", records=80, batch_sizes=[8, 40], rounds=3)
    assert sizes == [1, 8, 40] * 3
    assert result["answers_per_second"] == pytest.approx({1: 10, 8: 80, 40: 400})
    assert result["ratios"][40] == pytest.approx({"median": 40, "least": 40, "most": 40})
    text = bootstrap.table([result])
    assert "40.0 (40.0-40.0)" in text and "400.0" in text


def test_nothing_is_reported_where_the_batch_changes_the_groups(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "run_once", lambda config: (1.0, str(config.bootstrap.batch_size)))
    with pytest.raises(ValueError, match="batch size 8 wrote other groups"):
        bootstrap.measure(tmp_path, world, "inject", records=8, batch_sizes=[8], rounds=1)
