"""Bootstrap intervals: closed forms, and coverage on simulated data."""

from __future__ import annotations

import numpy as np
import pytest

from bpo.evaluation import intervals
from bpo.evaluation.benchmark import Question, Scores, Sums, ratio
from bpo.evaluation.intervals import LENGTH, UnitCounts, count_units, metric_intervals, paired_differences


def share(sums: Sums) -> dict[str, np.ndarray]:
    return {"share": ratio(sums["hits"], sums["answers"])}


def units_of(hits: np.ndarray, start: int = 0) -> UnitCounts:
    names = tuple(f"{start + number:05d}" for number in range(len(hits)))
    ones = np.ones(len(hits))
    return UnitCounts(
        names, ("hits", "answers", "answer_words"), np.stack([hits.astype(float), ones, 3 * ones], axis=1)
    )


def test_counts_of_one_unit_add_up_and_missing_ones_are_0() -> None:
    images = ("b.png", "a.png", "b.png")
    questions = [Question(id=str(number), image=image, text="?") for number, image in enumerate(images)]
    scores = Scores((("b.png", {"x": 1}), ("a.png", {"y": 2}), ("b.png", {"x": 3, "y": 1})), ({}, {}, {}))
    counts = count_units(questions, ["one two", "", "three"], scores)
    assert counts.units == ("a.png", "b.png")
    table = {name: counts.counts_UC[:, column].tolist() for column, name in enumerate(counts.names)}
    assert table == {"x": [0, 4], "y": [2, 1], "answers": [1, 2], "answer_words": [0, 3]}
    again = UnitCounts.from_json(counts.to_json())
    assert again.units == counts.units and (again.counts_UC == counts.counts_UC).all()
    assert float(counts.sums()["unknown"]) == 0


def test_a_constant_metric_has_an_interval_of_zero_width() -> None:
    found = metric_intervals(units_of(np.ones(40)), share)
    assert found == {"share": (1, 1, 1), LENGTH: (3, 3, 3)}


def test_an_interval_has_the_width_of_the_normal_approximation() -> None:
    hits = np.arange(900) % 3 == 0
    value, low, high = metric_intervals(units_of(hits), share, num_resamples=4000)["share"]
    half = 1.96 * np.sqrt(1 / 3 * 2 / 3 / 900)
    assert value == pytest.approx(1 / 3)
    assert (value - low, high - value) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))


def test_answers_about_one_image_count_as_one_draw() -> None:
    """Four equal answers per image: the interval is twice as wide as that of as many independent answers."""
    rng = np.random.default_rng(0)
    hits = rng.integers(2, size=200)
    repeated = UnitCounts(units_of(hits).units, units_of(hits).names, 4 * units_of(hits).counts_UC)
    widths = [np.ptp(metric_intervals(c, share)["share"][1:]) for c in (repeated, units_of(np.repeat(hits, 4)))]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, covered = np.random.default_rng(1), 0
    for seed in range(200):
        _, low, high = metric_intervals(units_of(rng.random(150) < 0.3), share, seed=seed, num_resamples=400)["share"]
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199  # 190 expected, standard deviation 3


def test_a_model_differs_from_itself_by_exactly_0() -> None:
    counts = units_of(np.random.default_rng(2).integers(2, size=50))
    assert paired_differences(counts, counts, share) == {"share": (0, 0, 0), LENGTH: (0, 0, 0)}


def test_pairing_removes_what_both_models_share() -> None:
    """The second model is right on 20 more of 400 units: the difference varies far less than either rate."""
    hits = np.random.default_rng(3).integers(2, size=400)
    better = hits.copy()
    better[np.flatnonzero(hits == 0)[:20]] = 1
    difference, low, high = paired_differences(units_of(hits), units_of(better), share)["share"]
    assert difference == pytest.approx(0.05)
    half = 1.96 * np.sqrt(0.05 * 0.95 / 400)
    assert (low, high) == (pytest.approx(0.05 - half, abs=0.004), pytest.approx(0.05 + half, abs=0.004))


def test_other_units_are_refused() -> None:
    with pytest.raises(ValueError, match="2 units are in one result only, such as '00000'"):
        paired_differences(units_of(np.ones(5)), units_of(np.ones(5), start=1), share)


def test_resamples_do_not_depend_on_the_memory_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = units_of(np.random.default_rng(4).integers(2, size=50))
    whole = metric_intervals(counts, share, num_resamples=100)
    monkeypatch.setattr(intervals, "_CHUNK_BYTES", 8 * 50 * 7)
    assert metric_intervals(counts, share, num_resamples=100) == whole


def test_metrics_of_only_one_model_are_left_out_of_a_comparison() -> None:
    def by_category(sums: Sums) -> dict[str, np.ndarray]:
        return {name: ratio(sums[name], sums["answers"]) for name in sums if name.startswith("category/")}

    first, second = units_of(np.ones(4)), units_of(np.ones(4))
    names = (("category/count", *first.names[1:]), ("category/colour", *second.names[1:]))
    first, second = (
        UnitCounts(each.units, of_each, each.counts_UC) for each, of_each in zip((first, second), names, strict=True)
    )
    assert list(paired_differences(first, second, by_category)) == [LENGTH]
