"""Annotations for bootstrapping, and scenes and questions for tuning and testing, as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.grounding.language import DESCRIBE, caption, existence, question
from benchmarks.grounding.world import Scene, WorldConfig, draw, rng_of, sample_scene
from bpo.job.durable import write_durably

QA_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Probe:
    """A yes/no question of the test: what is true, and whether the priors suggest it."""

    image: str
    text: str
    truth: bool
    agrees: bool


def write_annotations(folder: Path, world: WorldConfig, seed: int, count: int) -> Path:
    """`count` annotations of usual scenes in LLaVA's form, the base model's training distribution, other scenes."""
    path = folder / "annotations.json"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        scene, rng = _annotated(world, seed, number)
        image = f"train-{number:05d}.png"
        draw(scene).save(folder / "images" / image)
        if rng.random() < QA_SHARE:
            asked, answer = question(scene, rng)
        else:
            asked, answer = DESCRIBE[int(rng.integers(len(DESCRIBE)))], caption(scene, rng)
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"{number:05d}", "image": image, "conversations": turns})
    write_durably(path, json.dumps(records, indent=0))
    return path


def _annotated(world: WorldConfig, seed: int, number: int) -> tuple[Scene, Any]:
    split = f"annotations-{seed}"
    return sample_scene(world, split, number, contrary=False), rng_of(world, split, number, "text")


def evaluation_scenes(world: WorldConfig, split: str, count: int, *, contrary: bool = True) -> list[Scene]:
    return [sample_scene(world, split, number, contrary=contrary) for number in range(count)]


def write_images(folder: Path, split: str, scenes: list[Scene]) -> list[str]:
    """Draws scenes and returns their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, scene in enumerate(scenes):
        names.append(f"{split}-{number:05d}.png")
        if not (folder / names[-1]).exists():
            draw(scene).save(folder / names[-1])
    return names


def probes(world: WorldConfig, split: str, scenes: list[Scene], names: list[str], *, agrees: bool) -> Iterator[Probe]:
    """Two questions per scene: about a thing that is there, and about one that is not.

    In usual scenes, both true answers agree with the priors (a companion that is there, a stranger that is not); in
    contrary scenes they contradict them (a thing without its companions, and an absent companion).
    """
    for number, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        rng = rng_of(world, split, number, "probe")
        for present in (True, False):
            text, _ = existence(scene, rng, present=present, expected=not agrees)
            yield Probe(name, text, present, agrees)


def write_json(path: Path, value: Any) -> None:
    write_durably(path, json.dumps(value, indent=1) + "\n")


def probes_to_json(found: list[Probe]) -> list[dict[str, Any]]:
    return [asdict(probe) for probe in found]
