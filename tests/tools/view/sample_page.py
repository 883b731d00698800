"""Sample groups of each kind, one of them hostile, with refusals and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bpo.formats.files import group_to_json
from bpo.records import Completion, ContentPart, PreferenceGroup, Provenance, Turn
from bpo.tools.view.run import main

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>"
SOURCES = {"mllm-hal": "weakened-image", "llm-hal": "injected-errors"}


def group(number: int, annotation: str, negatives: dict[str, str], prompt: str = "Describe it.") -> PreferenceGroup:
    completions = [Completion(annotation, 1.0, "gt", Provenance("annotation"))]
    for kind, text in negatives.items():
        noise = 900 if kind == "mllm-hal" else None
        completions.append(Completion(text, 0.0, kind, Provenance(SOURCES[kind], noise_step=noise, seed=number)))
    turn = Turn("user", (ContentPart("image"), ContentPart("text", prompt)))
    return PreferenceGroup(f"r{number:03}", (f"{number % 3}.png",), (turn,), tuple(completions))


def scored(completion: Completion, gain: float) -> dict[str, Any]:
    """Scores with a log-ratio of `gain` nats per token; twice that for injected errors."""
    tokens = completion.response.split(" ")
    gain *= 2 if completion.type == "llm-hal" else 1
    reference = [-1.0] * len(tokens)
    return {
        "response": completion.response,
        "tokens": tokens,
        "policy": [value + gain for value in reference],
        "reference": reference,
    }


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    return path


def write_pictures(folder: Path, count: int = 2) -> None:
    for number in range(count):
        pixels = np.full((90, 120, 3), 200 - 150 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_data(folder: Path) -> Path:
    """60 groups, one of them hostile, two refusals (one of a record without a group), scores of ten groups."""
    write_pictures(folder)  # the third image is missing
    groups = [
        group(n, f"A dog and {n} cats.", {"llm-hal": f"A zebra and {n} cats.", "mllm-hal": "A dog."}) for n in range(59)
    ]
    groups.append(group(59, f"A dog. {HOSTILE}", {"llm-hal": f"{HOSTILE} A cat."}, prompt=HOSTILE))
    refused = [
        {"id": "r001", "source": "inject", "reason": "unchanged", "detail": "it is the annotation", "text": HOSTILE},
        {"id": "gone", "source": "weaken", "reason": "empty", "detail": "there is no text", "text": ""},
    ]
    scores = [
        {"id": record.id, "completions": [scored(c, n) for c in record.completions]}
        for n, record in enumerate(groups[:10])
    ]
    write_lines(folder / "groups.jsonl.refused.jsonl", refused)
    write_lines(folder / "scores.jsonl", scores)
    return write_lines(folder / "groups.jsonl", [group_to_json(record) for record in groups])


def view(data: Path, *more: str) -> Path:
    """Creates the page of `data` in the folder `page` next to it."""
    out = data.parent / "page"
    assert main([str(data), "--image-root", str(data.parent), "--out", str(out), "--workers", "1", *more]) == 0
    return out


def entries(page: Path) -> list[dict[str, Any]]:
    """All entries of a page."""
    found = []
    for chunk in sorted((page / "data").glob("[0-9]*.js")):
        text = chunk.read_text(encoding="ascii")
        found += json.loads(text[text.index("(") + 1 : text.rindex(")")])[1]
    return found
