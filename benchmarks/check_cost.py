"""Time and memory of `bpo check --no-images` and of streamed reading, for several numbers of records.

    python benchmarks/check_cost.py --json benchmarks/results/check-cpu.json

Writes LLaVA conversations of two answers (about 950 bytes each) as one JSON list to a temporary folder (1 GB at most),
checks them in a fresh process, and reads a million of them one at a time in another. Memory is the sum of the resident
sets of the process and its workers, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from synthetic import machine_of_run

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "a the red boat lake house white bus street dog cat on near under with two three man woman umbrella rain".split()
)
SAMPLE_S = 0.05
READ_ALL = """
import sys
from bpo.formats.files import iterate_annotations
print(sum(1 for _ in iterate_annotations(sys.argv[1])))
"""


def write_conversations(path: Path, num_records: int) -> None:
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    with path.open("w", encoding="utf-8") as file:
        for number in range(num_records):
            turns = []
            for turn in range(2):
                turns.append({"from": "human", "value": ("" if turn else "<image>\n") + words(12)})
                turns.append({"from": "gpt", "value": words(60)})
            record = {"id": f"{number:012d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}
            file.write((",\n" if number else "[") + json.dumps(record))
        file.write("]\n")


def measured(command: list[str]) -> dict[str, float]:
    """Wall-clock seconds of a command, and the peak resident bytes of it and its children."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    family = psutil.Process(process.pid)
    peak_bytes = 0
    while process.poll() is None:
        total = 0
        for member in (family, *_children(family)):
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:  # it ended after being listed
                continue
        peak_bytes = max(peak_bytes, total)
        time.sleep(SAMPLE_S)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{command} failed with status {process.returncode}")
    return {"seconds": round(seconds, 2), "peak_bytes": peak_bytes}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--streamed", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine_of_run(), "workers": args.workers, "check": [], "stream": []}
    with tempfile.TemporaryDirectory() as folder:
        for part, sizes in (("check", args.records), ("stream", args.streamed)):
            for num_records in sizes:
                path = Path(folder) / "data.json"
                write_conversations(path, num_records)
                command = [sys.executable, "-m", "bpo.cli", "check", str(path), "--no-images"]
                command += ["--workers", str(args.workers)]
                if part == "stream":
                    command = [sys.executable, "-c", READ_ALL, str(path)]
                figures = {"num_records": num_records, "file_bytes": path.stat().st_size, **measured(command)}
                result[part].append(figures)
                print(part, json.dumps(figures), flush=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
