"""The demo's synthetic world: scenes of objects whose company is predictable, and scenes where it is not.

In a *biased* scene the objects come from one place and companions are nearly always together, as a
fork comes with a plate in real photographs; a model trained on such scenes learns to name the
companions without looking. An *unbiased* scene takes its objects from different places, so that the habit is wrong.
Every scene is a pure function of (seed, split, index).

Shapes: H, W pixels; C colour channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .sprites import NAMES, NUM_OBJECTS, OBJECTS, PLACES, draw_sprite

DESCRIBE = "Describe the image."
GRID = 4
MAX_BIASED_PLACES = 3
MAX_UNBIASED_OBJECTS = 4
FAINT_OPACITY = (0.02, 0.20)


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What the world looks like and how much of it is written to disk."""

    seed: int = 0
    """Every scene, question and caption follows from it."""
    num_annotations: int = 2000
    """Scenes with a written conversation, the input of bootstrapping: drawn like the base model's training data."""
    num_evaluation_scenes: int = 400
    """Unbiased scenes for CHAIR and POPE; never used in training."""
    image_px: int = 48
    """Side of a scene, divided in 4 x 4 cells that hold at most one object each."""
    biased_fraction: float = 0.97
    """Share of biased scenes in the training distribution; the others are unbiased."""
    presence: float = 0.8
    """Probability that an object of the scene's place is present in a biased scene."""
    faint_fraction: float = 0.3
    """Probability that an object is drawn faintly, so that often only its company tells that it is there."""
    pixel_noise: float = 8.0
    """Standard deviation of the sensor noise, in units of 1/255."""

    def __post_init__(self) -> None:
        if self.image_px % GRID or self.image_px < 8 * GRID:
            raise ValueError(f"image_px must be a multiple of {GRID} and at least {8 * GRID}, got {self.image_px}")
        for field in ("biased_fraction", "presence", "faint_fraction"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{field} is a probability and must lie in [0, 1], got {value}")
        if self.presence == 0.0:
            raise ValueError("presence must be above 0, or biased scenes have no objects")
        for field in ("num_annotations", "num_evaluation_scenes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    @property
    def cell_px(self) -> int:
        """Side of one grid cell in pixels."""
        return self.image_px // GRID


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Which objects are there, and where: all that is needed to draw and to describe it."""

    objects: tuple[int, ...]
    """Object numbers in the canonical order."""
    cells: tuple[int, ...]
    """Grid cell of each object, row by row from the top left."""
    offsets: tuple[tuple[int, int], ...]
    """Pixels (right, down) of each object from the corner of its cell."""
    opacities: tuple[float, ...]
    """How strongly each object is drawn; 1 is fully visible."""
    background: tuple[int, int, int]
    noise_seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names in the canonical order."""
        return tuple(NAMES[i] for i in self.objects)

    @property
    def caption(self) -> str:
        """A true and complete description, for example "a photo with a rock, a leaf and a tree."."""
        return caption_of(self.names)


def caption_of(names: tuple[str, ...] | list[str]) -> str:
    """The sentence that names these objects in this order.

    :raises ValueError: if there is nothing to name.
    """
    if not names:
        raise ValueError("a caption needs at least one object")
    parts = [f"a {name}" for name in names]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"a photo with {listed}."


def question_about(name: str) -> str:
    """The yes/no question that POPE asks about one object."""
    return f"Is there a {name} in the image?"


def sample_scene(config: WorldConfig, split: str, index: int, *, biased_fraction: float | None = None) -> Scene:
    """Scene ``index`` of ``split``; the same arguments give the same scene whatever was drawn before.

    :param biased_fraction: probability of a biased scene; None means the configured one (the training distribution).
    """
    rng = np.random.default_rng([config.seed, zlib.crc32(split.encode()), index])
    fraction = config.biased_fraction if biased_fraction is None else biased_fraction
    objects = _biased_objects(rng, config.presence) if rng.random() < fraction else _unbiased_objects(rng)
    cells = rng.permutation(GRID * GRID)[: len(objects)]
    slack_px = config.cell_px - _sprite_px(config)
    offsets = rng.integers(0, slack_px + 1, size=(len(objects), 2))
    faint = rng.random(len(objects)) < config.faint_fraction
    opacities = np.where(faint, rng.uniform(*FAINT_OPACITY, len(objects)), 1.0)
    background = rng.integers(200, 236, size=3)
    return Scene(
        objects=tuple(int(i) for i in objects),
        cells=tuple(int(c) for c in cells),
        offsets=tuple((int(x), int(y)) for x, y in offsets),
        opacities=tuple(float(o) for o in opacities),
        background=(int(background[0]), int(background[1]), int(background[2])),
        noise_seed=int(rng.integers(2**31)),
    )


def iter_scenes(
    config: WorldConfig, split: str, count: int, *, biased_fraction: float | None = None
) -> Iterator[Scene]:
    """The first ``count`` scenes of a split."""
    return (sample_scene(config, split, i, biased_fraction=biased_fraction) for i in range(count))


def _biased_objects(rng: np.random.Generator, presence: float) -> list[int]:
    places = {PLACES[i] for i in rng.permutation(len(PLACES))[: rng.integers(1, MAX_BIASED_PLACES + 1)]}
    members = [i for i, thing in enumerate(OBJECTS) if thing.place in places]
    while True:
        present = [i for i in members if rng.random() < presence]
        if present:
            return present


def _unbiased_objects(rng: np.random.Generator) -> list[int]:
    num_objects = int(rng.integers(2, MAX_UNBIASED_OBJECTS + 1))
    places = rng.permutation(len(PLACES))[:num_objects]
    members = {place: [i for i, thing in enumerate(OBJECTS) if thing.place == PLACES[place]] for place in places}
    return sorted(int(rng.choice(members[place])) for place in places)


def _sprite_px(config: WorldConfig) -> int:
    return config.cell_px - max(1, config.cell_px // 6)


def draw_scene(config: WorldConfig, scene: Scene) -> Image.Image:
    """The scene as an RGB image of ``image_px`` x ``image_px``."""
    sprite_px = _sprite_px(config)
    image_HWC = np.empty((config.image_px, config.image_px, 3), dtype=np.float32)
    image_HWC[:] = scene.background
    placed = zip(scene.objects, scene.cells, scene.offsets, scene.opacities, strict=True)
    for index, cell, (right, down), opacity in placed:
        colour_HWC, coverage_HW1 = draw_sprite(index, sprite_px)
        top, left = (cell // GRID) * config.cell_px + down, (cell % GRID) * config.cell_px + right
        area_HWC = image_HWC[top : top + sprite_px, left : left + sprite_px]
        area_HWC += opacity * coverage_HW1 * (colour_HWC - area_HWC)
    noise_HWC = np.random.default_rng(scene.noise_seed).normal(0.0, config.pixel_noise, image_HWC.shape)
    return Image.fromarray(np.clip(image_HWC + noise_HWC, 0, 255).astype(np.uint8))


def describe_world() -> str:
    """Rooms and their objects, one line each, for reports and logs."""
    return "\n".join(f"{place}: {', '.join(t.name for t in OBJECTS if t.place == place)}" for place in PLACES)


assert NUM_OBJECTS == len(set(NAMES)), "two objects share a name"
