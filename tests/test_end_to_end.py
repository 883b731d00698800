"""bootstrap -> train -> evaluate -> export by the commands of the README, on LLaVA-format data with odd photographs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_llava, tiny_qwen
from tiny_families import tiny_gemma3

from bpo.cli import main as bpo
from tests.bootstrap.jobs import accept_random_text

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
EXIF_ORIENTATION = 0x0112

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def photograph(width: int = 180, height: int = 120) -> Image.Image:
    """Smooth light and texture, like a photograph."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_odd_photographs(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    photo = photograph()
    photo.save(folder / "plain.jpg")
    photo.convert("L").save(folder / "grey.jpg")
    photo.quantize(32).save(folder / "palette.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    photo.save(folder / "rotated.jpg", exif=exif)
    photo.resize((1, 1000)).save(folder / "needle.png")
    (folder / "broken.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:500])
    return [
        "plain.jpg",
        "grey.jpg",
        "palette.png",
        "cmyk.jpg",
        "rotated.jpg",
        "needle.png",
        "broken.jpg",
        "missing.jpg",
    ]


def write_annotations(root: Path) -> None:
    records = []
    for i, name in enumerate(write_odd_photographs(root / "images")):
        turns = [
            {"from": "human", "value": "<image>\nDescribe the photograph."},
            {"from": "gpt", "value": f"Photograph {i}: a red boat and two white houses by a quiet lake."},
        ]
        records.append({"id": f"r{i}", "image": name, "conversations": turns})
    (root / "annotations.json").write_text(json.dumps(records))


def write_benchmarks(root: Path) -> None:
    images = [{"id": i, "file_name": name} for i, name in enumerate(["plain.jpg", "cmyk.jpg"])]
    categories = [{"id": 1, "name": "boat"}, {"id": 2, "name": "dog"}]
    instances = {"images": images, "categories": categories, "annotations": [{"image_id": 0, "category_id": 1}]}
    (root / "instances.json").write_text(json.dumps(instances))
    questions = [
        {"question_id": 1, "image": "plain.jpg", "text": "Is there a boat in the image?", "label": "yes"},
        {"question_id": 2, "image": "grey.jpg", "text": "Is there a dog in the image?", "label": "no"},
    ]
    (root / "coco_pope_random.json").write_text("".join(json.dumps(q) + "\n" for q in questions))


def flags(root: Path, model: Path) -> list[str]:
    sections = {
        "model.path": model,
        "data.annotations": root / "annotations.json",
        "data.image_root": root / "images",
        "data.groups": root / "groups.jsonl",
        "train.output_dir": root / "run",
        "data.max_bad_share": 0.5,
        "train.max_steps": 2,
        "bootstrap.weaken.max_new_tokens": 24,
        "bootstrap.inject.max_new_tokens": 24,
    }
    pairs = [[f"--{key}", str(value)] for key, value in sections.items()]
    return ["--config", str(ROOT / "bpo" / "recipes" / "tiny-cpu.yaml"), *sum(pairs, [])]


def train(arguments: list[str], cwd: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bpo.train", *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("family", ["llava", "qwen", "gemma3"])
def test_odd_photographs_go_through_every_command(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_random_text(monkeypatch)
    model = {"llava": tiny_llava, "qwen": tiny_qwen, "gemma3": tiny_gemma3}[family](tmp_path / "model")
    write_annotations(tmp_path)
    write_benchmarks(tmp_path)
    arguments = flags(tmp_path, model)

    assert bpo(["bootstrap", *arguments]) == 0
    groups = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    quarantined = [json.loads(line) for line in (tmp_path / "groups.jsonl.quarantine.jsonl").read_text().splitlines()]
    # Qwen2.5-VL rejects an aspect ratio above 200; LLaVA's processor crops the same image. All others are read.
    bad = {"broken.jpg", "missing.jpg"} | ({"needle.png"} if family == "qwen" else set())
    assert {entry["file"][0] for entry in quarantined} == bad
    assert len(groups) >= 3 and not bad & {g["images"][0] for g in groups}
    sources = {c["provenance"]["source"] for g in groups for c in g["completions"]}
    assert {"annotation", "weakened-image"} <= sources

    train(arguments, tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)

    merged = tmp_path / "merged"
    paths = ["--model.path", str(model), "--export.checkpoint", str(tmp_path / "run"), "--export.output", str(merged)]
    assert bpo(["export", *paths]) == 0
    from transformers import AutoModelForImageTextToText

    exported = AutoModelForImageTextToText.from_pretrained(merged)
    base = dict(AutoModelForImageTextToText.from_pretrained(model).named_parameters())
    moved = [name for name, p in exported.named_parameters() if not torch.equal(p, base[name])]
    assert moved and not any("vision_tower" in n or "visual.blocks" in n or "embed_tokens" in n for n in moved)

    results = tmp_path / "results.json"
    evaluate = ["--evaluation.chair_instances", str(tmp_path / "instances.json"), "--evaluation.output", str(results)]
    evaluate += ["--evaluation.pope_questions", json.dumps([str(tmp_path / "coco_pope_random.json")])]
    assert (
        bpo(["evaluate", *arguments, "--model.path", str(merged), "--evaluation.max_new_tokens", "8", *evaluate]) == 0
    )
    metrics = json.loads(results.read_text())["metrics"]
    assert {"chair/chair_i", "chair/recall", "pope/accuracy", "pope/yes_ratio"} <= metrics.keys()
