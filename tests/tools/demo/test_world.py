"""The synthetic world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.suite import read_suite
from bpo.tools.demo.files import build_world
from bpo.tools.demo.rewriting import rewriting_request, rewriting_turn
from bpo.tools.demo.sprites import NAMES, NUM_OBJECTS, OBJECTS, companions
from bpo.tools.demo.vocabulary import build_tokenizer
from bpo.tools.demo.world import WorldConfig, caption_of, draw_scene, iter_scenes, sample_scene

SMALL = WorldConfig(seed=3, num_annotations=6, num_evaluation_scenes=40)


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, config in (("a", SMALL), ("b", SMALL), ("c", replace(SMALL, seed=4))):
        build_world(tmp_path / name, config, progress=False)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert _files(tmp_path / "a") != _files(tmp_path / "c")


def test_a_scene_does_not_depend_on_those_drawn_before_it() -> None:
    assert list(iter_scenes(SMALL, "annotations", 5))[4] == sample_scene(SMALL, "annotations", 4)
    assert sample_scene(SMALL, "annotations", 4) != sample_scene(SMALL, "evaluation", 4)
    assert sample_scene(SMALL, "annotations", 4) != sample_scene(replace(SMALL, seed=4), "annotations", 4)


def test_unbiased_scenes_never_hold_companions() -> None:
    for scene in iter_scenes(SMALL, "evaluation", 300, biased_fraction=0.0):
        assert 2 <= len(scene.objects) <= 4
        assert len({OBJECTS[i].place for i in scene.objects}) == len(scene.objects)


def test_the_training_distribution_is_mostly_company() -> None:
    scenes = list(iter_scenes(SMALL, "annotations", 1000))
    together = [set(companions(i)) <= set(s.objects) for s in scenes for i in s.objects]
    # One of two is surely there; the other with probability `presence`, save in the 3 % of unbiased scenes.
    assert 0.65 < np.mean(together) < 0.9


def test_every_object_is_drawn_in_its_own_cell_and_unlike_the_others() -> None:
    scene = sample_scene(SMALL, "annotations", 0)
    empty = replace(scene, objects=(), cells=(), offsets=(), opacities=())
    background_HWC = np.asarray(draw_scene(SMALL, empty), dtype=int)
    drawings = []
    for thing in range(NUM_OBJECTS):
        alone = replace(scene, objects=(thing,), cells=(5,), offsets=((1, 1),), opacities=(1.0,))
        change_HWC = np.abs(np.asarray(draw_scene(SMALL, alone), dtype=int) - background_HWC)
        assert change_HWC[12:24, 12:24].sum() == change_HWC.sum() > 0
        drawings.append(np.asarray(draw_scene(SMALL, alone))[12:24, 12:24].astype(int))
    for i in range(NUM_OBJECTS):
        for j in range(i):
            assert np.abs(drawings[i] - drawings[j]).mean() > 5, (NAMES[i], NAMES[j])


def test_captions_are_english_in_the_canonical_order() -> None:
    assert caption_of(["rock"]) == "a photo with a rock."
    assert caption_of(["tree", "rock", "leaf"]) == "a photo with a tree, a rock and a leaf."
    assert all(list(s.objects) == sorted(s.objects) for s in iter_scenes(SMALL, "annotations", 200))
    with pytest.raises(ValueError, match="at least one object"):
        caption_of([])


def test_coco_files_say_what_is_in_the_images(tmp_path: Path) -> None:
    world = build_world(tmp_path, SMALL, progress=False)
    instances, captions = json.loads(world.instances.read_text()), json.loads(world.captions.read_text())
    name_of = {c["id"]: c["name"] for c in instances["categories"]}
    for image, caption in zip(instances["images"], captions["annotations"], strict=True):
        with Image.open(world.images / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
        names = [name_of[a["category_id"]] for a in instances["annotations"] if a["image_id"] == image["id"]]
        assert caption["image_id"] == image["id"] and caption["caption"] == caption_of(names)
    assert [line.split(", ")[0] for line in world.synonyms.read_text().splitlines()] == list(NAMES)


def test_annotations_are_llava_conversations_about_training_images_only(tmp_path: Path) -> None:
    world = build_world(tmp_path, SMALL, progress=False)
    records = json.loads(world.annotations.read_text())
    assert len(records) == SMALL.num_annotations
    evaluated = {i["file_name"] for i in json.loads(world.instances.read_text())["images"]}
    for record, scene in zip(records, iter_scenes(SMALL, "annotations", len(records)), strict=True):
        human, gpt = record["conversations"]
        assert human["value"].startswith("<image>\n") and gpt["value"] == scene.caption
        assert (world.images / record["image"]).is_file() and record["image"] not in evaluated


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_is_balanced_and_its_labels_are_true(tmp_path: Path, split: str) -> None:
    world = build_world(tmp_path, SMALL, progress=False)
    scenes = list(iter_scenes(SMALL, "evaluation", SMALL.num_evaluation_scenes, biased_fraction=0.0))
    rows = [json.loads(line) for line in world.pope[split].read_text().splitlines()]
    absent_companions = []
    for row in rows:
        scene = scenes[int(row["image"].removesuffix(".png").rsplit("_", 1)[1])]
        name = row["text"].removeprefix("Is there a ").removesuffix(" in the image?")
        assert (row["label"] == "yes") == (name in scene.names)
        if row["label"] == "no":
            absent_companions.append(any(i in scene.objects for i in companions(NAMES.index(name))))
    assert sum(r["label"] == "yes" for r in rows) * 2 == len(rows)
    assert np.mean(absent_companions) > 0.9 if split == "adversarial" else np.mean(absent_companions) < 0.7


def test_popular_questions_keep_asking_about_the_same_few_absent_objects(tmp_path: Path) -> None:
    world = build_world(tmp_path, SMALL, progress=False)
    asked = {}
    for split in ("random", "popular"):
        rows = [json.loads(line) for line in world.pope[split].read_text().splitlines()]
        asked[split] = {row["text"] for row in rows if row["label"] == "no"}
    # With at most 4 objects in a scene the first absent one of a fixed ranking is among the first 5.
    assert len(asked["popular"]) <= 5 < len(asked["random"])


def test_the_suite_asks_in_words_that_the_model_knows(tmp_path: Path) -> None:
    world = build_world(tmp_path, SMALL, progress=False)
    tokenizer = build_tokenizer()
    benchmarks = read_suite(EvaluationConfig(suite=str(world.suite))).benchmarks
    assert [benchmark.name for benchmark in benchmarks] == ["chair", "pope", "format_guard", "repetition"]
    for benchmark in benchmarks:
        for question in benchmark.questions:
            assert (world.images / question.image).exists()
            assert tokenizer.unk_token_id not in tokenizer(question.text).input_ids, question.text


def test_rewritings_always_name_something_absent() -> None:
    rng = np.random.default_rng(0)
    for scene in iter_scenes(SMALL, "annotations", 300):
        request, answer = rewriting_turn(scene.objects, rng)
        assert request == rewriting_request(scene.caption) and scene.caption in request
        named = {name for name in NAMES if f" {name}" in answer.replace(",", "").replace(".", "")}
        assert named - set(scene.names)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("presence", 0.0, "presence"),
        ("biased_fraction", 1.5, "1.5"),
        ("image_px", 50, "50"),
        ("num_annotations", 0, "0"),
    ],
)
def test_impossible_worlds_are_refused_by_name(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{field: value})  # type: ignore[arg-type]
