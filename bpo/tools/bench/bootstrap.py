"""Batched bootstrapping compared with one record at a time, on the demo's model.

    bpo bench bootstrap                              # trains the demo's base model first, about two minutes
    bpo bench bootstrap --demo runs/demo/seed-0      # uses the model of an earlier demo
    bpo bench bootstrap --json FILE

Every variant is a complete `bpo bootstrap`, from loading the model to groups on disk, with its own
`bootstrap.batch_size`; the largest batch also runs with other key-value caches and without prefetching. All variants
must write the same groups, else nothing is reported and the exit status is 1. They run in turns; figures are medians.
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
from bpo.config.bootstrap import CacheKind, Source
from bpo.config.training import Config
from bpo.tools.demo.base import build_base_model
from bpo.tools.demo.environment import quiet_libraries, use_one_thread
from bpo.tools.demo.files import World, build_world
from bpo.tools.demo.recipe import Recipe
from bpo_kernels.bench.measure import machine

TARGET_RATIO = 8.0
OTHER_CACHES: tuple[CacheKind, ...] = ("dynamic", "static")


def demo_model(folder: Path) -> World:
    """The demo's world and base model in `folder`; creates them if they are missing."""
    recipe = Recipe()
    world = build_world(folder / "world", recipe.world(seed=0))
    if not (folder / "base" / "config.json").exists():
        build_base_model(folder / "base", recipe.world(seed=0), recipe.base(seed=0))
    return world


ONE_AT_A_TIME = "one at a time"


def sides(batch_sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Name -> bootstrapping options of each variant. The first is the baseline."""
    named: dict[str, dict[str, Any]] = {ONE_AT_A_TIME: {"batch_size": 1}}
    named |= {f"batch {size}": {"batch_size": size} for size in batch_sizes}
    largest = max(batch_sizes)
    named |= {f"batch {largest}, {cache} cache": {"batch_size": largest, "cache": cache} for cache in OTHER_CACHES}
    return named | {f"batch {largest}, none ahead": {"batch_size": largest, "num_workers": 0}}


def job(folder: Path, world: World, source: Source, records: int, options: dict[str, Any], output: Path) -> Config:
    config = Recipe().bootstrap(folder, world, seed=0)
    bootstrap = replace(config.bootstrap, sources=[source], limit=records, **options)
    return replace(config, data=replace(config.data, groups=str(output / "groups.jsonl")), bootstrap=bootstrap)


def run_once(config: Config) -> tuple[float, str]:
    """Runs one job; returns its duration in seconds and the groups written."""
    started = time.perf_counter()
    run_bootstrap(config, progress=False)
    return time.perf_counter() - started, Path(config.data.groups).read_text(encoding="utf-8")


def measure(
    folder: Path, world: World, source: Source, records: int, batch_sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Seconds and answers per second of each variant, run in turns; `ratios` relative to one at a time.

    Raises:
        ValueError: Two variants wrote different groups.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides(batch_sizes)}
    expected: str | None = None
    for _ in range(rounds):
        for name, options in sides(batch_sizes).items():
            with tempfile.TemporaryDirectory() as output:
                elapsed_s, groups = run_once(job(folder, world, source, records, options, Path(output)))
            seconds[name].append(elapsed_s)
            expected = groups if expected is None else expected
            if groups != expected:
                raise ValueError(f"{source}: `{name}` and `{ONE_AT_A_TIME}` wrote different groups")
    return {
        "source": source,
        "records": records,
        "answers_per_second": {name: records / statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        "ratios": {name: _ratios(seconds[ONE_AT_A_TIME], values) for name, values in seconds.items()},
    }


def _ratios(one_at_a_time: Sequence[float], batched: Sequence[float]) -> dict[str, float]:
    """Speed-up per round; both sides of a round see similar noise."""
    each = [a / b for a, b in zip(one_at_a_time, batched, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'source':10} {'variant':26} {'answers/s':>10} {'speed-up':>18}"]
    for result in results:
        for name, rate in result["answers_per_second"].items():
            ratio = result["ratios"][name]
            text = f"{ratio['median']:.1f} ({ratio['least']:.1f}-{ratio['most']:.1f})"
            lines.append(f"{result['source']:10} {name:26} {rate:10.1f} {text:>18}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bpo bench bootstrap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="folder of a demo seed (default: a temporary one is created)")
    parser.add_argument("--records", type=int, default=1000, help="annotations to answer (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], help="and 1 (default: %(default)s)")
    parser.add_argument("--sources", nargs="+", default=["weaken", "inject"], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default: %(default)s)")
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
    print(f"\ntarget: best batch size at least {TARGET_RATIO:g}x one at a time, every source; {least:.1f}x: {verdict}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["bpo", "bench", "bootstrap", *argv])
        tree = {"command": command, "machine": machine(torch.device("cpu")), "results": results}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0
