"""The objects of the demo's world and their drawings.

There are sixteen objects in eight places; the two objects of a place are companions. An object is drawn as a list of
filled shapes on a unit square (x to the right, y down), at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Shape = tuple[str, tuple[float, ...], Colour]

OVERSAMPLING = 8

_BLACK, _WHITE, _GREY = (35, 35, 40), (245, 245, 240), (125, 125, 130)
_RED, _BLUE, _GREEN = (205, 40, 40), (40, 80, 200), (40, 140, 60)
_YELLOW, _ORANGE, _BROWN = (240, 200, 40), (235, 125, 30), (120, 75, 40)
_PURPLE, _PINK, _CYAN, _SILVER = (130, 60, 170), (240, 120, 170), (60, 180, 200), (170, 178, 190)


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object: its canonical name, synonyms, place and drawing."""

    name: str
    synonyms: tuple[str, ...]
    place: str
    shapes: tuple[Shape, ...]


def _object(place: str, names: str, *shapes: Shape) -> Object:
    name, *synonyms = names.split(",")
    return Object(name=name, synonyms=tuple(synonyms), place=place, shapes=shapes)


OBJECTS: tuple[Object, ...] = (
    _object(
        "table",
        "cup,mug",
        ("ellipse", (0.55, 0.30, 0.98, 0.75), _BLUE),
        ("ellipse", (0.66, 0.41, 0.87, 0.64), _WHITE),
        ("rectangle", (0.10, 0.15, 0.72, 0.90), _BLUE),
    ),
    _object(
        "table",
        "bottle,flask",
        ("rectangle", (0.38, 0.00, 0.62, 0.35), _PURPLE),
        ("rectangle", (0.22, 0.32, 0.78, 1.00), _PURPLE),
        ("rectangle", (0.22, 0.55, 0.78, 0.78), _WHITE),
    ),
    _object(
        "kitchen",
        "plate,dish",
        ("ellipse", (0.02, 0.10, 0.98, 0.90), _SILVER),
        ("ellipse", (0.20, 0.25, 0.80, 0.75), _WHITE),
    ),
    _object(
        "kitchen",
        "fork",
        ("rectangle", (0.42, 0.40, 0.58, 1.00), _BLACK),
        ("rectangle", (0.20, 0.35, 0.80, 0.48), _BLACK),
        ("rectangle", (0.20, 0.00, 0.32, 0.40), _BLACK),
        ("rectangle", (0.44, 0.00, 0.56, 0.40), _BLACK),
        ("rectangle", (0.68, 0.00, 0.80, 0.40), _BLACK),
    ),
    _object(
        "forest",
        "tree",
        ("rectangle", (0.40, 0.65, 0.60, 1.00), _BROWN),
        ("polygon", (0.50, 0.0, 0.98, 0.72, 0.02, 0.72), _GREEN),
    ),
    _object(
        "forest",
        "leaf",
        ("polygon", (0.05, 0.95, 0.15, 0.35, 0.95, 0.05, 0.70, 0.80), (110, 190, 50)),
        ("polygon", (0.05, 0.99, 0.01, 0.93, 0.70, 0.28, 0.75, 0.34), (50, 110, 30)),
    ),
    _object(
        "garden",
        "rock,stone",
        ("polygon", (0.05, 0.85, 0.18, 0.40, 0.48, 0.20, 0.82, 0.38, 0.98, 0.85), _GREY),
    ),
    _object(
        "garden",
        "flower,blossom",
        ("rectangle", (0.45, 0.50, 0.55, 1.00), _GREEN),
        ("ellipse", (0.15, 0.00, 0.85, 0.70), _PINK),
        ("ellipse", (0.37, 0.22, 0.63, 0.48), _YELLOW),
    ),
    _object(
        "road",
        "car,automobile",
        ("rectangle", (0.22, 0.22, 0.78, 0.55), _RED),
        ("rectangle", (0.0, 0.48, 1.0, 0.78), _RED),
        ("ellipse", (0.12, 0.65, 0.38, 0.95), _BLACK),
        ("ellipse", (0.62, 0.65, 0.88, 0.95), _BLACK),
    ),
    _object(
        "road",
        "bus,coach",
        ("rectangle", (0.0, 0.08, 1.0, 0.82), _ORANGE),
        ("rectangle", (0.08, 0.20, 0.92, 0.45), _WHITE),
        ("ellipse", (0.12, 0.70, 0.36, 0.96), _BLACK),
        ("ellipse", (0.64, 0.70, 0.88, 0.96), _BLACK),
    ),
    _object(
        "square",
        "bike,bicycle",
        ("ellipse", (0.0, 0.42, 0.46, 0.92), _BLUE),
        ("ellipse", (0.10, 0.53, 0.36, 0.81), _WHITE),
        ("ellipse", (0.54, 0.42, 1.0, 0.92), _BLUE),
        ("ellipse", (0.64, 0.53, 0.90, 0.81), _WHITE),
        ("rectangle", (0.22, 0.34, 0.78, 0.44), _BLUE),
        ("rectangle", (0.66, 0.12, 0.76, 0.44), _BLUE),
    ),
    _object(
        "square",
        "sign",
        ("rectangle", (0.44, 0.50, 0.56, 1.00), _GREY),
        (
            "polygon",
            (0.32, 0.0, 0.68, 0.0, 0.95, 0.2, 0.95, 0.42, 0.68, 0.62, 0.32, 0.62, 0.05, 0.42, 0.05, 0.2),
            _RED,
        ),
        ("rectangle", (0.20, 0.25, 0.80, 0.38), _WHITE),
    ),
    _object(
        "sea",
        "boat,ship",
        ("polygon", (0.0, 0.66, 1.0, 0.66, 0.78, 0.98, 0.22, 0.98), _BROWN),
        ("polygon", (0.52, 0.0, 0.92, 0.58, 0.52, 0.58), _WHITE),
        ("rectangle", (0.44, 0.0, 0.52, 0.66), _BLACK),
    ),
    _object(
        "sea",
        "shell,seashell",
        ("polygon", (0.50, 0.98, 0.02, 0.35, 0.25, 0.08, 0.50, 0.0, 0.75, 0.08, 0.98, 0.35), (250, 190, 160)),
        ("polygon", (0.50, 0.98, 0.30, 0.12, 0.40, 0.06), _BROWN),
        ("polygon", (0.50, 0.98, 0.60, 0.06, 0.70, 0.12), _BROWN),
    ),
    _object(
        "beach",
        "ball",
        ("ellipse", (0.05, 0.05, 0.95, 0.95), _YELLOW),
        ("rectangle", (0.10, 0.42, 0.90, 0.58), _RED),
    ),
    _object(
        "beach",
        "kite",
        ("polygon", (0.50, 0.0, 0.95, 0.38, 0.50, 0.80, 0.05, 0.38), _CYAN),
        ("polygon", (0.50, 0.0, 0.50, 0.80, 0.05, 0.38), _PURPLE),
        ("rectangle", (0.47, 0.78, 0.53, 1.00), _BLACK),
    ),
)

PLACES: tuple[str, ...] = tuple(dict.fromkeys(thing.place for thing in OBJECTS))
NAMES: tuple[str, ...] = tuple(thing.name for thing in OBJECTS)
NUM_OBJECTS = len(OBJECTS)


def companions(index: int) -> tuple[int, ...]:
    """The other objects in the place of object `index`."""
    place = OBJECTS[index].place
    return tuple(i for i, thing in enumerate(OBJECTS) if thing.place == place and i != index)


def _scaled(points: Sequence[float], size: int) -> list[float]:
    return [value * (size - 1) for value in points]


@cache
def draw_sprite(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws object `index` on a `size` x `size` square.

    Returns:
        colour_HWC (float32 in 0..255) and coverage_HW1 (float32 in 0..1), for compositing.
    """
    big = size * OVERSAMPLING
    canvas = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    for kind, points, colour in OBJECTS[index].shapes:
        getattr(pen, kind)(_scaled(points, big), fill=(*colour, 255))
    # Downsample premultiplied colour; otherwise the transparent black around the sprite bleeds into its edges.
    rgba_HWC = np.asarray(canvas, dtype=np.float32)
    coverage_HW1 = rgba_HWC[..., 3:] / 255.0
    premultiplied_HWC = _box_reduce(rgba_HWC[..., :3] * coverage_HW1)
    coverage_HW1 = _box_reduce(coverage_HW1)
    return premultiplied_HWC / np.maximum(coverage_HW1, 1e-6), coverage_HW1


def _box_reduce(image_HWC: np.ndarray) -> np.ndarray:
    height, width, channels = image_HWC.shape
    size_h, size_w = height // OVERSAMPLING, width // OVERSAMPLING
    return image_HWC.reshape(size_h, OVERSAMPLING, size_w, OVERSAMPLING, channels).mean(axis=(1, 3))
