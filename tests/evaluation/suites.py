"""Question files of CHAIR and POPE and a suite of both, over a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

IMAGES = ("a.png", "b.png", "c.png")
SUITE = """\
name: both
defaults: {max_new_tokens: 3}
benchmarks:
  - type: chair
    instances: instances.json
  - type: pope
    questions: [pope_random.json, pope_popular.json]
"""


def write_files(folder: Path, images: tuple[str, ...] = IMAGES) -> Path:
    """Writes pictures, instances.json (a dog on the first picture), two POPE files; returns the path of suite.yaml.

    The questions of both POPE files are the same; their answer is yes about the first picture.
    """
    for number, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * number % 256, 90, 40)).save(folder / name)
    instances = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(images)],
        "annotations": [{"image_id": 0, "category_id": 1}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    lines = [
        {"question_id": number, "image": name, "text": "A dog?", "label": "no" if number else "yes"}
        for number, name in enumerate(images)
    ]
    for split in ("random", "popular"):
        (folder / f"pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "suite.yaml").write_text(SUITE)
    return folder / "suite.yaml"
