"""A small folder in the form of AMBER's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RELATIONS = {
    "person": ["man", "people"],
    "man": ["person"],
    "dog": ["puppy"],
    "cat": [],
    "boat": ["ship"],
    "ship": [],
    "sky": [],
    "shoe": [],
    "TV": ["screen"],
}
IGNORED = ("shoe", "light")


def write_folder(
    folder: Path, descriptions: dict[int, Any], questions: dict[int, tuple[str, str]] | None = None
) -> Path:
    """Writes AMBER's files.

    Args:
        folder: Where.
        descriptions: Id -> (`truth`, `hallu`) of a description; its image is AMBER_<id>.jpg.
        questions: Id -> (`type`, `truth`) of a yes/no question, all about AMBER_1.jpg.
    """
    generative = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in descriptions]
    discriminative = [{"id": n, "image": "AMBER_1.jpg", "query": f"Question {n}?"} for n in questions or {}]
    annotations = [{"id": n, "type": "generative", "truth": t, "hallu": h} for n, (t, h) in descriptions.items()]
    annotations += [{"id": n, "type": kind, "truth": truth} for n, (kind, truth) in (questions or {}).items()]
    (folder / "query").mkdir(parents=True)
    for name, tree in (
        ("query/query_generative.json", generative),
        ("query/query_discriminative.json", discriminative),
        ("annotations.json", annotations),
        ("relation.json", RELATIONS),
    ):
        (folder / name).write_text(json.dumps(tree, indent=1))
    (folder / "safe_words.txt").write_text("\n".join(IGNORED))
    return folder
