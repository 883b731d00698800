"""The grounding benchmark's world and statistics; its models and pictures are not needed here."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.grounding.analysis import compare, spearman
from benchmarks.grounding.arms import ARMS, grid_of
from benchmarks.grounding.evaluate import figures
from benchmarks.grounding.language import caption, existence, facts, question
from benchmarks.grounding.world import THING_OF, WorldConfig, companions, rng_of, sample_scene

WORLD = WorldConfig()


@pytest.mark.parametrize("contrary", [False, True])
def test_every_assertion_of_a_caption_is_true_of_its_scene(contrary):
    for index in range(300):
        scene, rng = sample_scene(WORLD, "test", index, contrary=contrary), rng_of(WORLD, "test", index, "text")
        found = list(facts(caption(scene, rng), scene))
        assert {fact.words for fact in found if fact.kind == "object"} == set(scene.names)
        assert all(fact.holds for fact in found)


def test_errors_of_each_kind_are_found_and_an_absent_thing_counts_once():
    scene = next(
        scene
        for index in range(1000)
        if "car" in (scene := sample_scene(WORLD, "test", index, contrary=False)).names
        and len({item.column for item in scene.placed}) > 1
        and scene.ground == "street"
    )
    car = next(item for item in scene.placed if item.thing.name == "car")
    other = next(item for item in scene.placed if item.column != car.column)
    side = "right" if car.column < other.column else "left"
    colour = "blue" if car.colour != "blue" else "green"
    text = f"There is a {colour} car and a yellow pig. The car is to the {side} of the {other.thing.name}. Gravel."
    wrong = [(fact.kind, fact.words) for fact in facts(text, scene) if not fact.holds]
    name = other.thing.name
    assert wrong == [
        ("object", "pig"), ("colour", f"{colour} car"), ("side", f"car {side} {name}"), ("ground", "gravel")
    ]  # fmt: skip


def test_usual_scenes_follow_the_priors_and_contrary_scenes_do_not():
    usual = [sample_scene(WORLD, "test", index, contrary=False) for index in range(400)]
    contrary = [sample_scene(WORLD, "test", index, contrary=True) for index in range(400)]

    def share_at_home(scenes):
        return np.mean([item.thing.place == scene.ground for scene in scenes for item in scene.placed])

    assert share_at_home(usual) > 0.8 and share_at_home(contrary) == 0
    assert all(len({THING_OF[name].place for name in scene.names}) == len(scene.names) for scene in contrary)


def test_questions_have_their_answers_in_the_scene():
    for index in range(300):
        scene, rng = sample_scene(WORLD, "test", index, contrary=True), rng_of(WORLD, "test", index, "text")
        assert all(fact.holds for fact in facts(question(scene, rng)[1], scene) if fact.kind in ("colour", "side"))
        asked, answer = existence(scene, rng, present=False, expected=True)
        assert answer.startswith("No") and any(name in asked for name in companions(scene.names))


def test_no_arm_is_tuned_on_more_settings_than_the_control():
    control, *others = (len(grid_of(arm)) for arm in ARMS)
    assert not ARMS[0].sources and set(others) == {max(others)} and max(others) <= control


def test_rates_count_wrong_facts_over_asserted_facts():
    described = [
        {"asserted": {"object": 4, "colour": 1}, "wrong": {"object": 1}, "recall": 0.5, "words": 10},
        {"asserted": {"object": 4, "side": 1}, "wrong": {"side": 1}, "recall": 1.0, "words": 20},
    ]
    questions = [{"agrees": True, "right": True}, {"agrees": False, "right": True}, {"agrees": False, "right": False}]
    rates = figures({"descriptions": described, "questions": questions})
    assert rates["wrong"] == pytest.approx(2 / 10) and rates["chair_i"] == pytest.approx(1 / 8)
    assert rates["chair_s"] == 0.5 and rates["recall"] == 0.75 and rates["words"] == 15
    assert rates["yes_no_agrees"] == 1.0 and rates["yes_no_contradicts"] == 0.5


def _score(rate: float, seed: int) -> dict:
    rng = np.random.default_rng([seed, round(1000 * rate)])
    wrong = rng.binomial(4, rate, size=400)
    return {"descriptions": [{"wrong": {"object": int(n)}, "asserted": {"object": 4}, "recall": 0.9} for n in wrong]}


def test_a_clear_difference_is_significant_and_none_is_not():
    control = {seed: _score(0.06, seed) for seed in range(5)}
    better = compare({seed: _score(0.04, seed) for seed in range(5)}, control)
    assert better["ratio"] == pytest.approx(2 / 3, abs=0.12) and better["p"] < 0.01 and better["interval"][1] < 1
    same = compare({seed: _score(0.06, seed + 100) for seed in range(5)}, control)
    assert same["interval"][0] < 1 < same["interval"][1] and same["p"] > 0.05
    assert compare({7: _score(0.06, 7)}, control) is None  # no common seed


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1.0)
