"""Cost of a page with many groups: build time, disk space, and time in the browser.

    python -m benchmarks.view_cost [--groups 10000] [--json benchmarks/results/view-cpu.json]

Each group has a 640 x 480 photograph (noise and gradients, which compress no better than real photographs), an
annotation of 100 words and two negatives, one with a different text and one with a tenth of the words changed. Browser
times are measured in the browser: from navigation until the first 20 records are in the document, from a key press
until those of the next page are (also for a random sample, whose records are in 20 files), and searches through all
texts: the first, which loads them, and a second. Memory is the peak resident memory of the building process and its
workers, with shared memory counted once (Linux), sampled every 50 ms; `--limit` draws 200 groups.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.synthetic import machine_of_run
from tests.browser import BROWSER, Tab, browser_tab

NUM_PICTURES = 64
SAMPLE_S = 0.05
VIEW = "import sys; from bpo.tools.view.run import main; sys.exit(main(sys.argv[1:]))"
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
            annotation, other = rng.choice(WORDS, (2, 100))
            near = np.where(rng.random(100) < 0.1, other, annotation)
            completions: list[dict[str, Any]] = [{"response": " ".join(annotation), "score": 1, "type": "gt"}]
            weak = {"source": "weakened-image", "noise_step": 900, "seed": number}
            completions.append({"response": " ".join(other), "score": 0, "type": "mllm-hal", "provenance": weak})
            completions.append({"response": " ".join(near), "score": 0, "type": "llm-hal"})
            image = f"{number % NUM_PICTURES}.jpg"
            group = {"id": f"g{number}", "images": [image], "prompt": "Describe it.", "completions": completions}
            file.write(json.dumps(group) + "\n")
    return path


def build(*arguments: str) -> tuple[float, float, float]:
    """Runs `bpo view`; returns wall-clock seconds, CPU seconds and peak MiB."""
    started, used = time.perf_counter(), processor_s()
    process = psutil.Popen(
        [sys.executable, "-c", VIEW, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    most = 0
    while process.poll() is None:
        try:
            most = max(most, sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True))))
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # the process has just ended
            pass
        time.sleep(SAMPLE_S)
    if process.returncode:
        sys.exit(f"bpo view failed with exit status {process.returncode}")
    return time.perf_counter() - started, processor_s() - used, most / 2**20


def processor_s() -> float:
    """CPU seconds of all finished child processes and their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(tab: Tab, action: str, ready: str) -> float:
    """Seconds from an action until `ready` is true and painted, by the page's own clock."""
    wait = f"""new Promise(done => {{
        const started = performance.now();
        {action};
        const look = () => ({ready}) ? requestAnimationFrame(() => done((performance.now() - started) / 1000))
                                     : setTimeout(look, 1);
        look();
    }})"""
    return tab.run(wait)


def in_browser(page: Path, num_groups: int) -> dict[str, float]:
    """Browser times in seconds, and its memory."""
    status = "document.getElementById('status').textContent"
    full = "document.querySelectorAll('article').length === 20"

    def search(text: str, many: str) -> float:
        return timed(
            tab, f"location.hash = 'search={text}'", f"location.hash.includes('{text}') && {status}.match({many})"
        )

    with browser_tab() as tab:
        started = time.perf_counter()
        tab.open(f"file://{page}/index.html")
        tab.until(full)
        figures = {"first_records_s": time.perf_counter() - started}
        key = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n'}))"
        figures["next_page_s"] = timed(tab, key, f"{full} && {status}.startsWith('21')")
        figures["first_search_s"] = search(f"g{num_groups - 1}", "/^1.1 of 1 /")
        figures["second_search_s"] = search("zebra+zebra", "/^1.20 of [0-9]/")
        sample = f"{status} = ''; location.hash = 'order=random&seed=7'"
        figures["random_sample_s"] = timed(tab, sample, f"{status}.startsWith('1\u201320')")
        figures["next_of_sample_s"] = timed(tab, key, f"{status}.startsWith('21')")
        tab.call("HeapProfiler.collectGarbage")
        figures["heap_mib"] = tab.call("Runtime.getHeapUsage")["usedSize"] / 2**20
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = write_data(Path(temporary), options.groups)
        page = Path(temporary) / "page"
        arguments = (str(data), "--image-root", temporary)
        figures: dict[str, Any] = {"groups": options.groups}
        for name, more in (("build", ("--out", str(page))), ("limit", ("--limit", "200", "--out", f"{page}-sample"))):
            took = build(*arguments, *more)
            figures |= {f"{name}_{unit}": value for unit, value in zip(("s", "cpu_s", "mib"), took, strict=True)}
        sizes = {name: sum(f.stat().st_size for f in (page / name).rglob("*")) / 2**20 for name in ("data", "images")}
        figures |= {f"{name}_mib": size for name, size in sizes.items()}
        figures["index_mib"] = (page / "data" / "index.js").stat().st_size / 2**20
        figures["texts_mib"] = sum(f.stat().st_size for f in (page / "data").glob("text-*.js")) / 2**20
        figures |= in_browser(page, options.groups)
    for name, value in figures.items():
        print(f"{name:18} {value:10.2f}" if isinstance(value, float) else f"{name:18} {value:10}")
    if options.json:
        browser = subprocess.run([str(BROWSER), "--version"], capture_output=True, text=True).stdout.strip()
        command = " ".join(["python -m benchmarks.view_cost", *sys.argv[1:]])
        tree = {"command": command, "machine": machine_of_run(), "browser": browser, **figures}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
