"""Groups of the demo's world for other methods, from made-up bootstrapped ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bpo.formats.files import read_groups
from bpo.records import Completion, PreferenceGroup
from bpo.tools.demo.methods import (
    DATA_OF,
    MethodData,
    data_of,
    method_names,
    objects_in,
    question_of,
    with_difficulty,
    write_method_groups,
)
from bpo.tools.demo.sprites import NAMES
from bpo.tools.demo.world import WorldConfig, question_about, sample_scene
from tests.demo_groups import write_bootstrapped

WORLD = WorldConfig(seed=5, num_annotations=24, num_evaluation_scenes=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[PreferenceGroup]]:
    folder = tmp_path_factory.mktemp("methods")
    written = write_method_groups(write_bootstrapped(folder / "groups.jsonl", WORLD), folder / "of", WORLD)
    names = ("shared", "difficulty", "corrected", "started")
    return {name: list(read_groups(getattr(written, name))) for name in names}


def scene_of(group: PreferenceGroup):
    return sample_scene(WORLD, "annotations", int(group.id.split("_")[1][:6]))


def test_the_other_scene_has_another_caption_and_about_as_many_objects(files) -> None:
    differences = []
    for group in files["shared"]:
        (other,) = [completion for completion in group.completions if completion.view == "other"]
        partner = sample_scene(WORLD, "annotations", int(group.other_images[0][6:12]))
        assert other.response == partner.caption != scene_of(group).caption
        differences.append(abs(len(partner.objects) - len(scene_of(group).objects)))
    assert max(differences) <= 2 and np.mean(differences) < 0.5


def test_weights_are_on_exactly_the_objects_that_the_scene_lacks(files) -> None:
    for group in files["shared"]:
        for completion in (c for c in group.completions if not c.view):
            marked = {completion.response[start:end] for start, end, weight in completion.token_weights if weight == 5}
            absent = {thing for thing, _, _ in objects_in(completion.response)} - set(scene_of(group).objects)
            assert marked == {f"a {NAMES[thing]}" for thing in absent}
            assert bool(marked) == (completion.score == 0)
            assert completion.beta == completion.weight == 1  # else every loss would change


def test_auxiliary_questions_are_answered_truly_with_both_answers(files) -> None:
    answers = []
    for group in files["shared"]:
        (question,) = group.auxiliary
        names = [name for name in NAMES if question.prompt[-1].text == question_about(name)]
        assert question.response == ("Yes." if names[0] in scene_of(group).names else "No.")
        answers.append(question.response)
    assert {"Yes.", "No."} == set(answers)


def test_a_scene_with_all_objects_is_asked_about_a_present_one() -> None:
    scene = replace(scene_of(PreferenceGroup("train_000000", (), (), ())), objects=tuple(range(len(NAMES))))
    assert {question_of(scene, np.random.default_rng(seed)).response for seed in range(8)} == {"Yes."}


def test_beta_is_larger_the_more_of_the_answer_is_right(files) -> None:
    for group in files["difficulty"]:
        for completion in group.completions:
            assert completion.beta == 1 if completion.score else 0.5 <= completion.beta < 1.5
    scene = scene_of(files["shared"][0])
    answers = [Completion(text, 0.0, "x") for text in (f"{scene.caption} a {NAMES[-1]}", f"a {NAMES[-1]}")]
    assert NAMES[-1] not in scene.names
    one_wrong, all_wrong = with_difficulty(replace(files["shared"][0], completions=tuple(answers)), scene).completions
    assert one_wrong.beta == pytest.approx(1.5 - 1 / (len(scene.objects) + 1))
    assert all_wrong.beta == 0.5


def test_corrected_answers_lose_their_wrong_objects_and_nothing_else(files) -> None:
    assert len(files["corrected"]) > 10
    for group in files["corrected"]:
        *preferred, own = group.completions
        corrected = preferred[-1]
        assert own.type == "mllm-self" and own.score == 0 and all(c.score == 1 for c in preferred)
        kept, named = ([thing for thing, _, _ in objects_in(c.response)] for c in (corrected, own))
        assert kept == [thing for thing in named if thing in scene_of(group).objects]
        assert corrected.weight == 0.5 + (len(named) - len(kept)) / len(named)


def test_started_prompts_and_completions_join_to_captions_of_which_one_is_right(files) -> None:
    assert len(files["started"]) > 24  # one per dispreferred answer
    longest = 0
    for group in files["started"]:
        assert group.prompt[-1].role == "assistant"
        start, (right, wrong) = group.prompt[-1].text, group.completions
        assert start.startswith("a photo with") and right.response[0] == wrong.response[0] == " "
        present = set(scene_of(group).objects)
        assert {thing for thing, _, _ in objects_in(start + right.response)} <= present
        assert not {thing for thing, _, _ in objects_in(start + wrong.response)} <= present
        longest = max(longest, len(objects_in(start)))
    assert longest >= 1


def test_groups_of_another_world_are_refused(tmp_path: Path) -> None:
    path = write_bootstrapped(tmp_path / "groups.jsonl", WORLD)
    with pytest.raises(ValueError, match="'train_000010' is not of an annotation of this world"):
        write_method_groups(path, tmp_path, replace(WORLD, num_annotations=10))


def test_a_method_comes_after_the_one_that_it_starts_from() -> None:
    names = method_names({name: Path() for name in ("opa-dpo", "opa-sft", "povid-1", "povid-2", "dpo")})
    assert all(names.index(data_of(name).after) < names.index(name) for name in names if data_of(name).after)
    assert data_of("dpo") == MethodData() and set(DATA_OF) > {"opa-dpo", "povid-2"}
