"""The demo's synthetic world: scenes with and without object co-occurrence.

In a *biased* scene, companions (the objects of one place) nearly always appear together, like fork and plate in real
photographs; a model trained on such scenes learns to name companions without using the image. In an *unbiased* scene,
all objects come from different places, contrary to this prior. A scene is a pure function of (seed, split, index).

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
    """Distribution and number of scenes."""

    seed: int = 0
    """Seed of all scenes, questions and captions."""
    num_annotations: int = 2000
    """Annotated scenes, the input of bootstrapping, from the distribution of the base model's training data."""
    num_evaluation_scenes: int = 400
    """Unbiased scenes for CHAIR and POPE; never used in training."""
    image_px: int = 48
    """Side of a scene, divided into 4 x 4 cells with at most one object each."""
    biased_fraction: float = 0.97
    """Share of biased scenes in the training distribution."""
    presence: float = 0.8
    """Probability that an object of a selected place is present in a biased scene."""
    faint_fraction: float = 0.3
    """Probability that an object is drawn faintly, so that often only co-occurrence indicates its presence."""
    pixel_noise: float = 8.0
    """Standard deviation of the sensor noise, in units of 1/255."""

    def __post_init__(self) -> None:
        if self.image_px % GRID or self.image_px < 8 * GRID:
            raise ValueError(f"image_px must be a multiple of {GRID} and at least {8 * GRID}, got {self.image_px}")
        for field in ("biased_fraction", "presence", "faint_fraction"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{field} is a probability and must be in [0, 1], got {value}")
        if self.presence == 0.0:
            raise ValueError("presence must be above 0, else biased scenes have no objects")
        for field in ("num_annotations", "num_evaluation_scenes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    @property
    def cell_px(self) -> int:
        """Side of a grid cell in pixels."""
        return self.image_px // GRID


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects of a scene, their positions and the background."""

    objects: tuple[int, ...]
    """Object indices in canonical order."""
    cells: tuple[int, ...]
    """Grid cell of each object, row by row from the top left."""
    offsets: tuple[tuple[int, int], ...]
    """Pixels (right, down) of each object from the corner of its cell."""
    opacities: tuple[float, ...]
    """Opacity of each object; 1 is fully visible."""
    background: tuple[int, int, int]
    noise_seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names in canonical order."""
        return tuple(NAMES[i] for i in self.objects)

    @property
    def caption(self) -> str:
        """A correct and complete description, such as "a photo with a rock, a leaf and a tree."."""
        return caption_of(self.names)


def caption_of(names: tuple[str, ...] | list[str]) -> str:
    """The caption that names these objects in this order.

    Raises:
        ValueError: `names` is empty.
    """
    if not names:
        raise ValueError("a caption needs at least one object")
    parts = [f"a {name}" for name in names]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"a photo with {listed}."


def question_about(name: str) -> str:
    """The POPE question about one object."""
    return f"Is there a {name} in the image?"


def sample_scene(config: WorldConfig, split: str, index: int, *, biased_fraction: float | None = None) -> Scene:
    """Scene `index` of `split`, determined by the arguments only.

    Args:
        biased_fraction: Probability of a biased scene; None uses that of the training distribution.
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
    """The first `count` scenes of a split."""
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
    """The scene as an RGB image of `image_px` x `image_px`."""
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
    """Places and their objects, one line per place."""
    return "\n".join(f"{place}: {', '.join(t.name for t in OBJECTS if t.place == place)}" for place in PLACES)


assert NUM_OBJECTS == len(set(NAMES)), "two objects share a name"
