"""Which images a benchmark asks about: those of a list, or a seeded sample."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def sampled_images(images: Sequence[str], size: int, seed: int) -> tuple[str, ...]:
    """`size` images drawn without replacement, or all if there are not more.

    Each image's place in the draw is a hash of the seed and its name: the sample depends neither on the order of the
    images nor on the folder, and samples of overlapping sets overlap as far as possible.
    """

    def place(image: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed} {Path(image).name}".encode("utf-8", "surrogatepass")).digest(), image

    return tuple(sorted(images, key=place)[:size])


def listed_images(path: Path, images: Sequence[str], benchmark: str, *, complete: bool) -> tuple[str, ...]:
    """The images that a file lists, one per line: by path, by file name with or without suffix, or by COCO's number.

    Args:
        complete: Whether every line must be an image of the benchmark; otherwise one must.

    Raises:
        ValueError: The file cannot be read, a line names several images, or images are missing.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a text file with one image path per line") from error
    by_name: dict[str, list[str]] = {}
    for image in images:
        stem = Path(image).stem
        coco_number = stem.rsplit("_", 1)[-1].lstrip("0") if stem[-1:].isdecimal() else ""
        for name in {Path(image).name, stem, coco_number} - {""}:
            by_name.setdefault(name, []).append(image)
    known, chosen, missing = set(images), [], []
    for number, line in ((n, line) for n, line in enumerate(lines, 1) if line):
        name = Path(line).name
        found = [line] if line in known else by_name.get(name) or by_name.get(name.lstrip("0"), [])
        if len(found) > 1:
            raise ValueError(
                f"{path}, line {number}: {line!r} names {len(found)} images of {benchmark}; write the path"
            )
        chosen += found
        missing += [] if found else [f"line {number} ({line!r})"]
    if missing and (complete or not chosen):
        raise ValueError(
            f"{path}: {len(missing)} lines are no images of {benchmark}, such as {missing[0]}; remove them, or use the "
            "list of this benchmark"
        )
    if missing:
        logger.info("%s: %d of its images are not in %s", path, len(missing), benchmark)
    return tuple(dict.fromkeys(chosen))
