"""Thumbnails of a group's images and of their weakened versions, reproduced from the provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bpo.bootstrap.weaken import Weakening, picture_weakener
from bpo.config.bootstrap import WeakenConfig
from bpo.formats.images import ImageError, load_image
from bpo.records import PreferenceGroup

SIDE_PIXELS = 320
JPEG_QUALITY = 82
# Noise compresses badly and has no detail to inspect.
NOISE_SIDE_PIXELS = 224
NOISE_JPEG_QUALITY = 65
_KINDS = {"weakened-image": "noise", "cropped-image": "crop", "masked-image": "mask"}
APPROXIMATION = "approximation: the noise was added to normalised pixels, here it is added to the image"


@dataclass(frozen=True, slots=True)
class Shown:
    """A completion generated from weakened images: its index in the group, the weakening, a note for the caption."""

    index: int
    weakening: Weakening
    note: str


def weakenings_of(group: PreferenceGroup) -> list[Shown]:
    """The weakenings recorded in the provenance of the group's completions."""
    found = []
    for index, completion in enumerate(group.completions):
        provenance = completion.provenance
        kind = _KINDS.get(provenance.source) if provenance else None
        if provenance is None or kind is None or not isinstance(provenance.seed, int):
            continue
        step = provenance.noise_step
        if kind == "noise" and not (isinstance(step, int) and 0 <= step < 1000):
            continue
        note = APPROXIMATION if kind == "noise" and provenance.space != "pixel" else ""
        space = "pixel" if kind == "noise" else None
        found.append(Shown(index, Weakening(kind, provenance.seed, step, space), note))  # type: ignore[arg-type]
    return found


def no_pictures(group: PreferenceGroup) -> dict[str, Any]:
    """The result of `make_pictures` without pictures."""
    return {"images": [{"path": None, "name": name, "error": ""} for name in group.images], "weakened": {}}


def make_pictures(
    number: int, group: PreferenceGroup, root: Path, folder: Path, options: WeakenConfig
) -> dict[str, Any]:
    """Writes the pictures to `folder`/images/`number`-*.jpg; returns `images` and `weakened` for `entry_of`."""
    made: dict[str, Any] = {"images": [], "weakened": {}}
    pictures: list[tuple[Image.Image, Image.Image]] = []
    for place, name in enumerate(group.images):
        image: dict[str, Any] = {"path": None, "name": name, "error": ""}
        try:
            picture = load_image(root, name)
        except ImageError as error:
            image["error"] = str(error)
        else:
            small = _small(picture)
            image["path"] = _save(small, folder, f"images/{number:07}-{place}.jpg")
            pictures.append((picture, small))
        made["images"].append(image)
    if not pictures or len(pictures) < len(group.images):
        return made  # the noise of the second image depends on the first
    for shown in weakenings_of(group):
        weakener = picture_weakener(shown.weakening, options, None)
        paths = []
        for place, (picture, small) in enumerate(pictures):
            name = f"images/{number:07}-{place}-{shown.index}.jpg"
            if shown.weakening.kind == "noise":
                noised = weakener(_small(small, NOISE_SIDE_PIXELS))
                paths.append(_save(noised, folder, name, NOISE_JPEG_QUALITY))
            else:
                # Cropping the full image keeps detail; a mask looks the same on the thumbnail.
                source = picture if shown.weakening.kind == "crop" else small
                paths.append(_save(_small(weakener(source)), folder, name))
        made["weakened"][str(shown.index)] = {"paths": paths, "note": shown.note}
    return made


def _small(picture: Image.Image, side: int = SIDE_PIXELS) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return small


def _save(picture: Image.Image, folder: Path, name: str, quality: int = JPEG_QUALITY) -> str:
    picture.save(folder / name, "JPEG", quality=quality)
    return name
