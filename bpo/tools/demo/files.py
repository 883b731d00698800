"""Writes the synthetic world to disk in the file formats of real data sets.

root/annotations.json      LLaVA conversations about biased scenes: the input of bootstrapping
root/images/*.png          the scenes of annotations and evaluation
root/eval/instances.json   COCO instances of the unbiased evaluation scenes
root/eval/captions.json    COCO captions of the same scenes
root/eval/synonyms.txt     one object per line, canonical name first
root/eval/pope_*.json      POPE questions, one JSON object per line: random, popular, adversarial
root/eval/suite.yaml       all of these as a suite for `bpo evaluate --suite`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from .sprites import NAMES, NUM_OBJECTS, OBJECTS
from .world import (
    DESCRIBE,
    GRID,
    Scene,
    WorldConfig,
    draw_scene,
    iter_scenes,
    question_about,
)

POPE_SPLITS = ("random", "popular", "adversarial")
POPE_QUESTIONS_PER_ANSWER = 1
CO_OCCURRENCE_SCENES = 2000
MAX_DESCRIPTION_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class World:
    """Paths of the files of a world."""

    root: Path
    config: WorldConfig
    annotations: Path
    images: Path
    instances: Path
    captions: Path
    synonyms: Path
    pope: dict[str, Path]
    """POPE question file of each split."""
    suite: Path


def build_world(root: Path, config: WorldConfig, *, progress: bool = True) -> World:
    """Writes all files of the world to `root` and returns their paths.

    The same config gives the same bytes. Annotated scenes follow the biased training distribution; evaluation scenes
    are unbiased and not used elsewhere.
    """
    images, evaluation = root / "images", root / "eval"
    images.mkdir(parents=True, exist_ok=True)
    evaluation.mkdir(parents=True, exist_ok=True)
    annotated = list(iter_scenes(config, "annotations", config.num_annotations))
    evaluated = list(iter_scenes(config, "evaluation", config.num_evaluation_scenes, biased_fraction=0.0))
    for prefix, scenes in (("train", annotated), ("eval", evaluated)):
        for i, scene in enumerate(tqdm(scenes, desc=f"drawing {prefix} scenes", unit="scene", disable=not progress)):
            draw_scene(config, scene).save(images / _file_name(prefix, i))

    world = World(
        root=root,
        config=config,
        annotations=root / "annotations.json",
        images=images,
        instances=evaluation / "instances.json",
        captions=evaluation / "captions.json",
        synonyms=evaluation / "synonyms.txt",
        pope={split: evaluation / f"pope_{split}.json" for split in POPE_SPLITS},
        suite=evaluation / "suite.yaml",
    )
    _write_json(world.annotations, [_conversation(i, scene) for i, scene in enumerate(annotated)])
    _write_json(world.instances, _coco_instances(config, evaluated))
    _write_json(world.captions, _coco_captions(config, evaluated))
    lines = [", ".join((thing.name, *thing.synonyms)) for thing in OBJECTS]
    world.synonyms.write_text("\n".join(lines) + "\n", encoding="utf-8")
    co_occurrence_KK = _co_occurrence(iter_scenes(config, "co-occurrence", CO_OCCURRENCE_SCENES))
    for split, path in world.pope.items():
        _write_jsonl(path, _pope_questions(config, evaluated, split, co_occurrence_KK))
    world.suite.write_text(_suite(world), encoding="utf-8")
    return world


def _suite(world: World) -> str:
    """Prompts are those that the demo's models know; files are beside the suite."""
    describe = {"prompt": DESCRIBE, "max_new_tokens": MAX_DESCRIPTION_TOKENS}
    ground_truth = {"instances": world.instances.name, "captions": world.captions.name, "synonyms": world.synonyms.name}
    benchmarks = [
        {"type": "chair", **ground_truth, **describe},
        {"type": "pope", "questions": [path.name for path in world.pope.values()]},
        {"type": "format_guard", "questions": world.pope["random"].name},
        {"type": "repetition", "instances": world.instances.name, **describe},
    ]
    return yaml.safe_dump({"name": "demo", "benchmarks": benchmarks}, sort_keys=False)


def _file_name(prefix: str, index: int) -> str:
    return f"{prefix}_{index:06d}.png"


def _conversation(index: int, scene: Scene) -> dict[str, Any]:
    return {
        "id": f"train_{index:06d}",
        "image": _file_name("train", index),
        "conversations": [
            {"from": "human", "value": f"<image>\n{DESCRIBE}"},
            {"from": "gpt", "value": scene.caption},
        ],
    }


def _coco_images(config: WorldConfig, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    side = config.image_px
    return [{"id": i, "file_name": _file_name("eval", i), "height": side, "width": side} for i in range(len(scenes))]


def _coco_instances(config: WorldConfig, scenes: Sequence[Scene]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes):
        for thing, cell in zip(scene.objects, scene.cells, strict=True):
            left, top = (cell % GRID) * config.cell_px, (cell // GRID) * config.cell_px
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image_id,
                    "category_id": thing + 1,
                    "bbox": [left, top, config.cell_px, config.cell_px],
                    "area": config.cell_px**2,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": t.name, "supercategory": t.place} for i, t in enumerate(OBJECTS)]
    return {"images": _coco_images(config, scenes), "annotations": annotations, "categories": categories}


def _coco_captions(config: WorldConfig, scenes: Sequence[Scene]) -> dict[str, Any]:
    annotations = [{"id": i, "image_id": i, "caption": scene.caption} for i, scene in enumerate(scenes)]
    return {"images": _coco_images(config, scenes), "annotations": annotations}


def _co_occurrence(scenes: Iterable[Scene]) -> np.ndarray:
    """count_KK[i, j]: number of scenes with objects i and j; the diagonal counts single objects."""
    count_KK = np.zeros((NUM_OBJECTS, NUM_OBJECTS), dtype=np.int64)
    for scene in scenes:
        count_KK[np.ix_(scene.objects, scene.objects)] += 1
    return count_KK


def _pope_questions(
    config: WorldConfig, scenes: Sequence[Scene], split: str, co_occurrence_KK: np.ndarray
) -> list[dict[str, Any]]:
    """One question about a present and one about an absent object per scene.

    Absent objects are selected at random, by frequency in the training distribution (popular), or by co-occurrence with
    the objects in the scene (adversarial).
    """
    questions: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng([config.seed, POPE_SPLITS.index(split), i])
        present = [int(k) for k in rng.permutation(scene.objects)[:POPE_QUESTIONS_PER_ANSWER]]
        absent = [int(k) for k in rng.permutation(NUM_OBJECTS) if k not in scene.objects]
        if split == "popular":
            absent.sort(key=lambda k: -int(co_occurrence_KK[k, k]))
        elif split == "adversarial":
            absent.sort(key=lambda k: -int(co_occurrence_KK[k, list(scene.objects)].sum()))
        for yes, no in zip(present, absent, strict=False):
            for thing, label in ((yes, "yes"), (no, "no")):
                questions.append(
                    {
                        "question_id": len(questions) + 1,
                        "image": _file_name("eval", i),
                        "text": question_about(NAMES[thing]),
                        "label": label,
                    }
                )
    return questions


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
