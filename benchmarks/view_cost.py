"""What a page of many groups costs: to build, on disk, and in the browser until the first records stand there.

    python benchmarks/view_cost.py [--groups 10000] [--json benchmarks/results/view-cpu.json]

Groups have a 640 x 480 photograph each (noise and gradients: no file compresses better than a real one would), an
annotation of 100 words and two negatives. Times in the browser are its own: from navigation until the first 20 records
are in the document, from a key until the next page's are, and a search through all texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bpo.viewing.run import main as view
from bpo_kernels.bench_measure import machine
from tests.browser import browser_tab

NUM_PICTURES = 64
WORDS = "a dog cat two red table on the left of small house with people near tree and car zebra holding cup".split()


def write_data(folder: Path, num_groups: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        ramp = np.linspace(0, 200, 640)[None, :, None] * rng.random(3)
        pixels = (ramp + rng.integers(0, 40, (480, 640, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    path = folder / "groups.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            texts = [" ".join(rng.choice(WORDS, 100)) for _ in range(3)]
            completions: list[dict[str, Any]] = [{"response": texts[0], "score": 1, "type": "gt"}]
            weak = {"source": "weakened-image", "noise_step": 900, "seed": number}
            completions.append({"response": texts[1], "score": 0, "type": "mllm-hal", "provenance": weak})
            completions.append({"response": texts[2], "score": 0, "type": "llm-hal"})
            image = f"{number % NUM_PICTURES}.jpg"
            group = {"id": f"g{number}", "images": [image], "prompt": "Describe it.", "completions": completions}
            file.write(json.dumps(group) + "\n")
    return path


def in_browser(page: Path, num_groups: int) -> dict[str, float]:
    """Seconds in the browser."""
    full = "document.querySelectorAll('article').length === 20"
    with browser_tab() as tab:
        started = time.perf_counter()
        tab.open(f"file://{page}/index.html")
        tab.until(full)
        first_s = time.perf_counter() - started
        started = time.perf_counter()
        tab.press("n")
        tab.until(f"{full} && document.getElementById('status').textContent.startsWith('21')")
        next_s = time.perf_counter() - started
        started = time.perf_counter()
        tab.run(f"location.hash = 'search=g{num_groups - 1}'; 0")
        tab.until("document.querySelectorAll('article').length === 1", timeout_s=120)
        search_s = time.perf_counter() - started
        started = time.perf_counter()
        tab.run("location.hash = 'search=zebra+zebra'; 0")
        tab.until("document.getElementById('status').textContent.includes('of')", timeout_s=120)
        again_s = time.perf_counter() - started
        heap = tab.run("performance.memory.usedJSHeapSize") / 2**20
    return {
        "first_records_s": first_s,
        "next_page_s": next_s,
        "search_s": search_s,
        "second_search_s": again_s,
        "heap_mib": heap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = write_data(Path(temporary), options.groups)
        page = Path(temporary) / "page"
        started = time.perf_counter()
        if view([str(data), "--image-root", temporary, "--out", str(page)]) != 0:
            sys.exit(1)
        figures: dict[str, Any] = {"groups": options.groups, "build_s": time.perf_counter() - started}
        sizes = {name: sum(f.stat().st_size for f in (page / name).rglob("*")) / 2**20 for name in ("data", "images")}
        figures |= {f"{name}_mib": size for name, size in sizes.items()}
        figures["index_mib"] = (page / "data" / "index.js").stat().st_size / 2**20
        figures |= in_browser(page, options.groups)
    for name, value in figures.items():
        print(f"{name:18} {value:10.2f}" if isinstance(value, float) else f"{name:18} {value:10}")
    if options.json:
        tree = {"command": " ".join(["python", *sys.argv]), "machine": machine(torch.device("cpu")), **figures}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
