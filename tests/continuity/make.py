"""Writes c84fdfe.tar.xz: a training run and a bootstrapping job, both interrupted, as commit c84fdfe left them on disk.

git worktree add /tmp/base c84fdfe && PYTHONPATH=/tmp/base/checkout:/tmp/base python tests/continuity/make.py /tmp/base
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).with_name("c84fdfe.tar.xz")
NUM_RECORDS, NUM_ANSWERED = 16, 8  # two batches: a server is sent at least eight requests at a time
NUM_GROUPS, NUM_STEPS, STOPPED_AT = 8, 4, 2
TRAIN = """\
model: {path: llava, dtype: float32}
data: {groups: groups.jsonl, image_root: images, keep_lengths: false, num_workers: 0}
lora: {r: 1, alpha: 2, dropout: 0.0}
trainable: {projector: frozen}
train:
  output_dir: run
  ds_config: ds_configs/zero2.json
  epochs: 1
  groups_per_step: 2
  lr: 0.005
  save_every_steps: 2
  tensorboard: false
"""
BOOTSTRAP = """\
model: {path: llava, dtype: float32}
data: {annotations: annotations.json, groups: made/groups.jsonl, image_root: images}
bootstrap: {sources: [inject], batch_size: 2, inject: {server: {model: rewriter, concurrency: 1}}}
"""


def command(root: Path, stage: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a stage of the bpo in `root`, on one CPU rank."""
    names = {"train": ["bpo/train.py"], "bootstrap": ["bpo/cli.py", "bootstrap"]}
    script, *rest = names[stage]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(root / "checkout"), "HF_HUB_OFFLINE": "1"}
    return [sys.executable, str(root / script), *rest, "--config", f"{stage}.yaml", *arguments], environment


def rewrite(body: dict[str, Any]) -> str:
    """The server's reply: the annotation's sentence about another animal."""
    found = re.findall(r"Photo (\d+) shows", body["messages"][-1]["content"])
    return f"Photo {found[-1]} shows a dog on a mat."


def write_inputs(folder: Path) -> None:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from tests.tiny import save, tiny_llava

    tiny_llava(folder / "float32", num_layers=1)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "float32", dtype=torch.bfloat16)  # half the bytes
    save(folder / "llava", model, AutoProcessor.from_pretrained(folder / "float32"))
    shutil.rmtree(folder / "float32")
    (folder / "images").mkdir()
    records, groups = [], []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (30 + number, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    for number in range(NUM_RECORDS):
        image, answer = f"{number % 4}.png", f"Photo {number} shows a cat on a mat."
        turns = [{"from": "human", "value": "<image>\nDescribe this image."}, {"from": "gpt", "value": answer}]
        records.append({"id": f"r{number}", "image": image, "conversations": turns})
        sides = [{"response": answer, "score": 1, "type": "gt"}, {"response": "A dog.", "score": 0, "type": "llm-hal"}]
        groups.append({"id": f"r{number}", "images": [image], "prompt": "Describe.", "completions": sides})
    (folder / "annotations.json").write_text(json.dumps(records))
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups[:NUM_GROUPS]))
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "bootstrap.yaml").write_text(BOOTSTRAP)


def interrupted_run(root: Path, folder: Path) -> None:
    """All steps, whose metrics stay; then the directory as a kill before the last checkpoint would have left it."""
    line, environment = command(root, "train")
    subprocess.run(line, cwd=folder, env=environment, check=True)
    checkpoints = folder / "run" / "checkpoints"
    shutil.rmtree(checkpoints / f"step-{NUM_STEPS:08}")
    (checkpoints / "latest").write_text(f"step-{STOPPED_AT:08}")


def killed_job(root: Path, folder: Path) -> None:
    """The server answers half of the records and hangs; then the job is killed."""
    from tests.bootstrap.fake_server import completion, fake_server

    done = threading.Event()

    def answer(body: dict[str, Any], number: int) -> Any:
        if number > NUM_ANSWERED:
            done.wait()
        return completion(rewrite(body))

    part = folder / "made" / "groups.jsonl.parts" / "rank-00000.jsonl"
    with fake_server(answer) as (url, received):
        line, environment = command(root, "bootstrap", f"--bootstrap.inject.server.url={url}")
        with subprocess.Popen(line, cwd=folder, env=environment) as job:
            while len(received) <= NUM_ANSWERED or part.read_bytes().count(b"\n") < NUM_ANSWERED:
                assert job.poll() is None
                time.sleep(0.1)
            job.kill()
        done.set()


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        interrupted_run(root, folder)
        killed_job(root, folder)
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        subprocess.run(["tar", "-tvf", str(ARCHIVE)], check=True)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
