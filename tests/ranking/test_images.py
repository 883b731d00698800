"""The best of several images per annotation."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.config.rank import RankConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.files import read_annotations
from bpo.ranking.images import run_image_choice
from bpo.ranking.run import RankSummary

# The score is the size of the picture file, but 0 for "tie" prompts.
PROGRAM = """
import json, os, sys
for entry in map(json.loads, sys.stdin):
    size = os.path.getsize(*entry["images"])
    print(json.dumps({"id": entry["id"], "scores": [0 if entry["prompt"] == "tie" else size]}))
"""


def annotation(name: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "images": ["square.png"], "prompt": f"<image>{prompt}", "response": "A dog.", **fields}


def run(folder: Path, photo_root: Path, *records: dict[str, Any], **data: Any) -> tuple[RankSummary, dict[str, Any]]:
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "own.py").write_text(PROGRAM)
    options = {"command": [sys.executable, str(folder / "own.py")]}
    data_config = DataConfig(annotations=str(folder / "in.jsonl"), image_root=str(photo_root), **data)
    rank = RankConfig(judge="command", options=options, output=str(folder / "out.jsonl"))
    summary = run_image_choice(Config(data=data_config, rank=rank), progress=False)
    written = read_annotations(folder / "out.jsonl").annotations
    return summary, {annotation.id: annotation for annotation in written}


def test_the_best_image_replaces_the_annotations(tmp_path: Path, photo_root: Path) -> None:
    sizes = {name: (photo_root / name).stat().st_size for name in ("tall.png", "wide.png", "square.png")}
    candidates = sorted(sizes)
    summary, found = run(
        tmp_path,
        photo_root,
        annotation("a", "describe", candidate_images=candidates),
        annotation("b", "tie", candidate_images=["wide.png", "tall.png"]),
        annotation("c", "describe", source="other"),
        annotation("d", "describe", candidate_images=["gone.png", "square.png"]),
        max_bad_share=0.5,
    )
    assert found["a"].images == (max(sizes, key=sizes.__getitem__),)
    assert found["b"].images == ("wide.png",)  # the first of equals
    assert found["c"].images == ("square.png",) and found["c"].extra["source"] == "other"
    assert found["d"].images == ("square.png",) and found["d"].extra["candidate_images"] == ["gone.png", "square.png"]
    assert (summary.num_groups, summary.num_judged) == (7, 6)


def test_annotations_that_cannot_be_used_are_listed(tmp_path: Path, photo_root: Path) -> None:
    two = {"images": ["wide.png", "tall.png"], "prompt": "<image><image>Compare."}
    records = [
        annotation("text", "describe", candidate_images="wide.png"),
        annotation("gone", "describe", candidate_images=["gone.png"]),
        {**annotation("two", "", candidate_images=["wide.png"]), **two},
        annotation("fine", "describe", candidate_images=["wide.png"]),
    ]
    summary, found = run(tmp_path, photo_root, *records, max_bad_share=1.0)
    assert list(found) == ["fine"] and summary.num_bad_records == 2
    listed = [json.loads(line) for line in (tmp_path / "out.jsonl.judgements" / "quarantine.jsonl").open()]
    assert [(entry["record"], entry["code"]) for entry in listed] == [
        ("text", "wrong-type"),
        ("two", "image-parts"),
        ("gone#image-0", "not-judged"),
    ]


def test_an_option_that_is_missing_is_named(tmp_path: Path) -> None:
    config = Config(rank=RankConfig(judge="command"))
    with pytest.raises(ValueError, match="data.annotations must be set"):
        run_image_choice(config)
    with pytest.raises(ValueError, match="rank.output is empty"):
        run_image_choice(replace(config, data=DataConfig(annotations=str(tmp_path))))
