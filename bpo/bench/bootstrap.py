"""Bootstrapping in batches beside one record at a time: the demo's model, the same records and answers, in one run.

    bpo bench bootstrap                              # trains the demo's base model first, about two minutes
    bpo bench bootstrap --demo runs/demo/seed-0      # takes it from a demo that ran
    bpo bench bootstrap --json FILE

Both sides are `bpo bootstrap`, from loading the model to groups on disk, with another `bootstrap.batch_size`. What they
write must be equal, or nothing is reported and the exit status is 1. They run in turns; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bpo.bootstrap.run import run_bootstrap
from bpo.config import Config
from bpo.config_bootstrap import Source
from bpo.demo.base import build_base_model
from bpo.demo.environment import quiet_libraries, use_one_thread
from bpo.demo.files import World, build_world
from bpo.demo.recipe import Recipe
from bpo_kernels.bench_measure import machine

TARGET_RATIO = 8.0


def demo_model(folder: Path) -> World:
    """The demo's world and base model in `folder`, made where they are not there."""
    recipe = Recipe()
    world = build_world(folder / "world", recipe.world(seed=0))
    if not (folder / "base" / "config.json").exists():
        build_base_model(folder / "base", recipe.world(seed=0), recipe.base(seed=0))
    return world


def job(folder: Path, world: World, source: Source, records: int, batch_size: int, output: Path) -> Config:
    config = Recipe().bootstrap(folder, world, seed=0)
    options = replace(config.bootstrap, sources=[source], limit=records, batch_size=batch_size)
    return replace(config, data=replace(config.data, groups=str(output / "groups.jsonl")), bootstrap=options)


def run_once(config: Config) -> tuple[float, str]:
    """Seconds of one job, and the groups it wrote."""
    started = time.perf_counter()
    run_bootstrap(config, progress=False)
    return time.perf_counter() - started, Path(config.data.groups).read_text(encoding="utf-8")


def measure(
    folder: Path, world: World, source: Source, records: int, batch_sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Seconds and answers per second of each batch size, in turns; `ratios` to batch size 1.

    Raises:
        ValueError: two batch sizes wrote different groups.
    """
    seconds: dict[int, list[float]] = {size: [] for size in (1, *batch_sizes)}
    groups: dict[int, str] = {}
    for _ in range(rounds):
        for size in seconds:
            with tempfile.TemporaryDirectory() as output:
                elapsed_s, groups[size] = run_once(job(folder, world, source, records, size, Path(output)))
            seconds[size].append(elapsed_s)
            if groups[size] != groups[1]:
                raise ValueError(f"{source}: batch size {size} wrote other groups than batch size 1")
    return {
        "source": source,
        "records": records,
        "answers_per_second": {size: records / statistics.median(values) for size, values in seconds.items()},
        "seconds": seconds,
        "ratios": {size: _ratios(seconds[1], seconds[size]) for size in batch_sizes},
    }


def _ratios(one_at_a_time: Sequence[float], batched: Sequence[float]) -> dict[str, float]:
    """How many times faster, round by round: a machine's noise is much the same in both halves of a round."""
    each = [a / b for a, b in zip(one_at_a_time, batched, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'source':10} {'batch':>6} {'answers/s':>10} {'times faster':>24}"]
    for result in results:
        for size, rate in result["answers_per_second"].items():
            ratio = result["ratios"].get(size)
            text = f"{ratio['median']:.1f} ({ratio['least']:.1f}-{ratio['most']:.1f})" if ratio else "1"
            lines.append(f"{result['source']:10} {size:6} {rate:10.1f} {text:>24}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bpo bench bootstrap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="folder of a demo's seed; empty builds one for this run alone")
    parser.add_argument("--records", type=int, default=512, help="annotations to answer (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], help="beside 1 (default: %(default)s)")
    parser.add_argument("--sources", nargs="+", default=["weaken", "inject"], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of all batch sizes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    quiet_libraries()
    use_one_thread()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.demo or Path(temporary)
        world = demo_model(folder)
        try:
            results = [
                measure(folder, world, source, options.records, options.batch_sizes, options.rounds)
                for source in options.sources
            ]
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(results))
    least = min(max(ratio["median"] for ratio in result["ratios"].values()) for result in results)
    verdict = "met" if least >= TARGET_RATIO else "not met"
    print(f"\ntarget: every source at its best batch {TARGET_RATIO:g} times one at a time; {least:.1f}: {verdict}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["bpo", "bench", "bootstrap", *argv])
        tree = {"command": command, "machine": machine(torch.device("cpu")), "results": results}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0
