"""Scenes with priors: things that appear together, usual colours, usual sides, and scenes that contradict all of them.

In a *usual* scene most things belong to one place (a street, a kitchen ...), stand on its ground, have their usual
colours and are on their usual sides. In a *contrary* scene every thing comes from another place, on a ground of a
further one, half of the colours and sides being unusual. A scene is a pure function of (seed, split, index).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.grounding.pictures import HUES, background, glyph

SIDE_PX = 160
COLUMNS, ROWS = 3, 3
CELL_PX = SIDE_PX // COLUMNS
COLOURS = tuple(HUES)


@dataclass(frozen=True)
class Thing:
    """A kind of object. `colour`: its usual one, or None if it is never recoloured; `side`: its usual column."""

    name: str
    glyph: str
    place: str
    side: int
    colour: str | None = None


@dataclass(frozen=True)
class Ground:
    """The background of a place: its photograph and its words."""

    picture: str
    words: str


GROUNDS = {
    "kitchen": Ground("Wood.jpg", "a wooden table"),
    "street": Ground("Storm.jpg", "a dark sky"),
    "farm": Ground("GreenMeadow.jpg", "a green meadow"),
    "beach": Ground("Dune.jpg", "dry grass"),
    "office": Ground("brick.png", "a brick wall"),
    "forest": Ground("RainDrops.jpg", "large leaves"),
    "stage": Ground("FreshFlower.jpg", "orange petals"),
    "nursery": Ground("gravel.png", "gravel"),
}
_LEFT, _RIGHT = 0, 2
THINGS = (
    Thing("cup", "\u2615", "kitchen", _RIGHT),
    Thing("loaf", "\U0001f35e", "kitchen", _LEFT),
    Thing("pan", "\U0001f373", "kitchen", _LEFT),
    Thing("knife", "\U0001f52a", "kitchen", _RIGHT),
    Thing("car", "\U0001f697", "street", _LEFT, "red"),
    Thing("bus", "\U0001f68c", "street", _RIGHT),
    Thing("bicycle", "\U0001f6b2", "street", _LEFT),
    Thing("traffic light", "\U0001f6a6", "street", _RIGHT),
    Thing("cow", "\U0001f404", "farm", _LEFT),
    Thing("pig", "\U0001f416", "farm", _RIGHT),
    Thing("rooster", "\U0001f413", "farm", _LEFT),
    Thing("tractor", "\U0001f69c", "farm", _RIGHT, "green"),
    Thing("palm tree", "\U0001f334", "beach", _RIGHT),
    Thing("crab", "\U0001f980", "beach", _LEFT),
    Thing("umbrella", "\u26f1", "beach", _LEFT, "yellow"),
    Thing("sailboat", "\u26f5", "beach", _RIGHT),
    Thing("laptop", "\U0001f4bb", "office", _LEFT),
    Thing("book", "\U0001f4d5", "office", _RIGHT, "blue"),
    Thing("pencil", "\u270f", "office", _RIGHT),
    Thing("telephone", "\U0001f4de", "office", _LEFT),
    Thing("squirrel", "\U0001f43f", "forest", _LEFT),
    Thing("owl", "\U0001f989", "forest", _RIGHT),
    Thing("mushroom", "\U0001f344", "forest", _LEFT),
    Thing("pine tree", "\U0001f332", "forest", _RIGHT),
    Thing("guitar", "\U0001f3b8", "stage", _LEFT, "red"),
    Thing("drum", "\U0001f941", "stage", _RIGHT),
    Thing("violin", "\U0001f3bb", "stage", _RIGHT),
    Thing("trumpet", "\U0001f3ba", "stage", _LEFT),
    Thing("teddy bear", "\U0001f9f8", "nursery", _LEFT),
    Thing("bucket", "\U0001faa3", "nursery", _RIGHT, "blue"),
    Thing("cap", "\U0001f9e2", "nursery", _LEFT, "green"),
    Thing("backpack", "\U0001f392", "nursery", _RIGHT, "yellow"),
)
THING_OF = {thing.name: thing for thing in THINGS}
PLACES = tuple(GROUNDS)


@dataclass(frozen=True)
class Placed:
    """A thing in a scene: its colour, cell (column, row), offset and size in pixels, and opacity."""

    thing: Thing
    colour: str | None
    column: int
    row: int
    offset_px: tuple[int, int]
    size_px: int
    opacity: float


@dataclass(frozen=True)
class Scene:
    """Placed things from left to right, and the place whose ground they stand on."""

    placed: tuple[Placed, ...]
    ground: str
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.thing.name for item in self.placed)


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Strength of the priors of usual scenes, as probabilities."""

    seed: int = 0
    presence: float = 0.75
    foreign: float = 0.15
    usual_ground: float = 0.95
    usual_colour: float = 0.9
    usual_side: float = 0.9
    faint: float = 0.2


def rng_of(config: WorldConfig, split: str, index: int, what: str = "scene") -> np.random.Generator:
    return np.random.default_rng([config.seed, zlib.crc32(f"{split}/{what}".encode()), index])


def sample_scene(config: WorldConfig, split: str, index: int, *, contrary: bool) -> Scene:
    """Scene `index` of a split."""
    rng = rng_of(config, split, index)
    if contrary:
        places = [PLACES[i] for i in rng.permutation(len(PLACES))]
        things = [_one_of(rng, place) for place in places[: int(rng.integers(3, 5))]]
        ground, usual_colour, usual_side = places[-1], 0.5, 0.5
    else:
        ground, things = _usual_things(rng, config)
        usual_colour, usual_side = config.usual_colour, config.usual_side
    free = {(column, row) for column in range(COLUMNS) for row in range(ROWS)}
    placed = []
    for thing in things:
        column, row = _cell(rng, thing, usual_side, free)
        size = int(rng.integers(round(0.75 * CELL_PX), CELL_PX + 4))
        slack = max(1, CELL_PX - size)
        offset = int(rng.integers(0, slack)), int(rng.integers(0, slack))
        opacity = float(rng.uniform(0.12, 0.45)) if rng.random() < config.faint else 1.0
        placed.append(Placed(thing, _colour(rng, thing, usual_colour), column, row, offset, size, opacity))
    placed.sort(key=lambda item: (item.column, item.row))
    return Scene(tuple(placed), ground, int(rng.integers(2**31)))


def _usual_things(rng: np.random.Generator, config: WorldConfig) -> tuple[str, list[Thing]]:
    place = PLACES[int(rng.integers(len(PLACES)))]
    members = [thing for thing in THINGS if thing.place == place]
    things = [thing for thing in members if rng.random() < config.presence]
    while len(things) < 2:
        things = [thing for thing in members if rng.random() < config.presence]
    others = [other for other in PLACES if other != place]
    if rng.random() < config.foreign:
        things.append(_one_of(rng, others[int(rng.integers(len(others)))]))
    ground = place if rng.random() < config.usual_ground else others[int(rng.integers(len(others)))]
    return ground, things


def _one_of(rng: np.random.Generator, place: str) -> Thing:
    members = [thing for thing in THINGS if thing.place == place]
    return members[int(rng.integers(len(members)))]


def _colour(rng: np.random.Generator, thing: Thing, usual: float) -> str | None:
    if thing.colour is None:
        return None
    others = [colour for colour in COLOURS if colour != thing.colour]
    return thing.colour if rng.random() < usual else others[int(rng.integers(len(others)))]


def _cell(rng: np.random.Generator, thing: Thing, usual_side: float, free: set[tuple[int, int]]) -> tuple[int, int]:
    """A free cell, on the usual side with probability `usual_side`, else in another column; takes it."""
    usual = rng.random() < usual_side
    cells = sorted(free)
    wanted = [cell for cell in cells if (cell[0] == thing.side) == usual] or cells
    cell = wanted[int(rng.integers(len(wanted)))]
    free.discard(cell)
    return cell


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `SIDE_PX`."""
    rng = np.random.default_rng(scene.seed)
    picture = background(GROUNDS[scene.ground].picture, SIDE_PX, rng)
    for item in scene.placed:
        ink = glyph(item.thing.glyph, item.colour, item.size_px)
        if item.opacity < 1.0:
            ink = ink.copy()
            ink.putalpha(ink.getchannel("A").point(lambda value, opacity=item.opacity: round(value * opacity)))
        left, top = item.column * CELL_PX + item.offset_px[0], item.row * CELL_PX + item.offset_px[1]
        picture.paste(ink, (left, top), ink)
    noise = rng.normal(0.0, 6.0, (SIDE_PX, SIDE_PX, 3))
    return Image.fromarray(np.clip(np.asarray(picture, dtype=np.float32) + noise, 0, 255).astype(np.uint8))


def companions(names: Sequence[str]) -> list[str]:
    """Absent things of the places of these things: what the prior expects."""
    places = {THING_OF[name].place for name in names}
    return [thing.name for thing in THINGS if thing.place in places and thing.name not in names]
