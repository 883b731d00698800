"""bpo bench bootstrap on a tiny world."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.tools.bench import bootstrap
from bpo.tools.demo.files import World, build_world
from bpo.tools.demo.recipe import Recipe


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path / "world", Recipe(num_annotations=4, num_evaluation_scenes=4).world(0), progress=False)


def test_sides_take_turns_and_ratios_are_round_by_round(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of whole jobs: a tenth of a second a batch, and groups that do not depend on it."""
    seen: list[tuple[int, str, int | None]] = []

    def run_once(config):
        options = config.bootstrap
        seen.append((options.batch_size, options.cache, options.num_workers))
        return 0.1 * -(-options.limit // options.batch_size), "groups"

    monkeypatch.setattr(bootstrap, "run_once", run_once)
    result = bootstrap.measure(tmp_path, world, "weaken", records=80, batch_sizes=[8, 40], rounds=3)
    plain = [(size, "reserved", None) for size in (1, 8, 40)]
    assert seen == [*plain, (40, "dynamic", None), (40, "static", None), (40, "reserved", 0)] * 3
    rates = result["answers_per_second"]
    assert rates["one at a time"] == pytest.approx(10) and rates["batch 8"] == pytest.approx(80)
    assert result["ratios"]["batch 40, static cache"] == pytest.approx({"median": 40, "least": 40, "most": 40})
    text = bootstrap.table([result])
    assert "40.0 (40.0-40.0)" in text and "400.0" in text


def test_nothing_is_reported_where_a_side_changes_the_groups(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "run_once", lambda config: (1.0, str(config.bootstrap.batch_size)))
    with pytest.raises(ValueError, match="`batch 8` and `one at a time` wrote different groups"):
        bootstrap.measure(tmp_path, world, "inject", records=8, batch_sizes=[8], rounds=1)
