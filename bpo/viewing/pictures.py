"""Small JPEGs of a group's image and of its weakened versions, made again from the provenance; in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bpo.bootstrap.weaken import Weakening, picture_weakener
from bpo.config_bootstrap import WeakenConfig
from bpo.data.images import ImageError, load_image
from bpo.records import PreferenceGroup

SIDE_PIXELS = 320
JPEG_QUALITY = 82
_KINDS = {"weakened-image": "noise", "cropped-image": "crop", "masked-image": "mask"}
APPROXIMATION = "an approximation: the noise was added to normalised pixels; here it is added to the picture"


@dataclass(frozen=True, slots=True)
class Job:
    """One group's pictures: which to make, and under which names in the page's folder."""

    number: int
    images: tuple[str, ...]
    weakenings: tuple[tuple[int, Weakening, str], ...]


def job_of(number: int, group: PreferenceGroup) -> Job:
    """The weakenings that the provenance of the group's completions tells of: (completion index, weakening, note)."""
    weakenings = []
    for index, completion in enumerate(group.completions):
        provenance = completion.provenance
        kind = _KINDS.get(provenance.source) if provenance else None
        if provenance is None or kind is None or provenance.seed is None:
            continue
        if kind == "noise" and provenance.noise_step is None:
            continue
        note = APPROXIMATION if kind == "noise" and provenance.space != "pixel" else ""
        space = "pixel" if kind == "noise" else None
        weakening = Weakening(kind, provenance.seed, provenance.noise_step, space)  # type: ignore[arg-type]
        weakenings.append((index, weakening, note))
    return Job(number, group.images, tuple(weakenings))


def make_pictures(
    jobs: Iterable[Job], root: Path, folder: Path, options: WeakenConfig, workers: int
) -> Iterator[dict[str, Any]]:
    """For each job in order `image`, `error` and `weakened`, as `entry_of` takes them; files go to `folder`/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if workers <= 1:
        for job in jobs:
            yield _make(job, root, folder, options)
        return
    with ProcessPoolExecutor(workers) as pool:
        listed = list(jobs)
        repeated = ([value] * len(listed) for value in (root, folder, options))
        yield from pool.map(_make, listed, *repeated, chunksize=16)


def _make(job: Job, root: Path, folder: Path, options: WeakenConfig) -> dict[str, Any]:
    made: dict[str, Any] = {"image": None, "error": "", "weakened": {}}
    if not job.images:
        return made
    try:
        picture = load_image(root, job.images[0])
    except ImageError as error:
        return made | {"error": str(error)}
    small = _small(picture)
    made["image"] = _save(small, folder, f"images/{job.number:07}.jpg")
    if len(job.images) > 1:
        made["error"] = f"the first of {len(job.images)} images"
    for index, weakening, note in job.weakenings:
        # A crop shows a part, which must keep its detail; noise and masks look the same on the small picture.
        source = picture if weakening.kind == "crop" else small
        weak = picture_weakener(weakening, options, None)(source)
        path = _save(_small(weak), folder, f"images/{job.number:07}-{index}.jpg")
        made["weakened"][str(index)] = {"path": path, "note": note}
    return made


def _small(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return small


def _save(picture: Image.Image, folder: Path, name: str) -> str:
    picture.save(folder / name, "JPEG", quality=JPEG_QUALITY)
    return name
