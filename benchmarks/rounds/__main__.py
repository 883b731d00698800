"""Compares recipes of bpo/recipes/rounds/ on the demo's world: CHAIR_i and recall by round.

    python -m benchmarks.rounds --output runs/rounds-demo [--seeds 3] [--methods sapo,spa] [--workers 2]

Per seed, world and base model are made once. Each method runs two rounds of 46 steps by `bpo rounds`; `bpo-one-round`
has one of 92 steps on all annotations. A restart goes on with what is not finished. Writes results and a Markdown
table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rounds.report import METRICS, summary, table
from benchmarks.synthetic import machine_of_run
from bpo.tools.demo.base import BaseConfig, build_base_model
from bpo.tools.demo.environment import quiet_libraries, use_one_thread
from bpo.tools.demo.files import World, build_world
from bpo.tools.demo.recipe import Recipe
from bpo.tools.demo.rounds import METHODS, DemoRounds, overlay, recipe_file, write_detections
from bpo.tools.demo.world import WorldConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "rounds-cpu.json"
# pds-dpo needs a reward model, and the world has none.
COMPARED = tuple(name for name in METHODS if name != "pds-dpo")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rounds-demo"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--methods", default="", help=f"names separated by commas (default: {','.join(COMPARED)})")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file for the results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small world, 1 seed, 3 steps a round")
    options = parser.parse_args(argv)
    unknown = sorted(set(filter(None, options.methods.split(","))) - set(COMPARED))
    if unknown or options.seeds < 1 or options.workers < 1:
        parser.error(f"--seeds and --workers must be at least 1, --methods one of {', '.join(COMPARED)}")
    if options.quick:
        options.seeds = 1
    return options


def sizes_of(quick: bool) -> tuple[DemoRounds, WorldConfig, BaseConfig]:
    if not quick:
        return DemoRounds(), Recipe().world(0), BaseConfig()
    world = WorldConfig(num_annotations=16, num_evaluation_scenes=4)
    small = {"batch": 8, "tower_batch": 8, "tower_width": 16, "text_width": 32, "text_layers": 1}
    base = BaseConfig(steps=150, tower_steps=4, learning_rate=3e-3, **small)
    return DemoRounds(steps=3, recipe=Recipe(groups_per_step=4, batch_size=16)), world, base


def prepare(folder: Path, seed: int, quick: bool) -> World:
    """World, base model and detections of a seed; made once."""
    _, world_config, base_config = sizes_of(quick)
    world = build_world(folder / "world", replace(world_config, seed=seed), progress=False)
    write_detections(world)
    if not (folder / "base" / "config.json").exists():
        build_base_model(folder / "base", world.config, replace(base_config, seed=seed), progress=False)
    return world


def bpo(*arguments: str, log: Path) -> None:
    """Runs the command in a process of its own.

    Raises:
        RuntimeError: It failed; the message has the end of its log.
    """
    with log.open("ab") as file:
        code = subprocess.call([sys.executable, "-m", "bpo.cli", *arguments], stdout=file, stderr=file, cwd=ROOT)
    if code:
        end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"bpo {' '.join(arguments)} failed with code {code}:\n{end}")


def evaluate_base(folder: Path, world: World, recipe: Recipe) -> None:
    output = folder / "base.json"
    if not output.exists():
        arguments = ["--model.path", str(folder / "base"), "--model.dtype", "float32", "--suite", str(world.suite)]
        arguments += ["--data.image_root", str(world.images), "--evaluation.batch_size", str(recipe.batch_size)]
        bpo("evaluate", *arguments, "--evaluation.output", str(output), log=folder / "base.log")


def run_method(folder: Path, world: World, method: str, sizes: DemoRounds) -> None:
    tree = overlay(method, folder / "base", world, folder / method, sizes)
    config = folder / f"{method}.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    bpo("rounds", "--config", str(recipe_file(method)), "--config", str(config), log=folder / f"{method}.log")
    print(f"{folder.name}, {method}: {time.monotonic() - started:.0f} s", flush=True)


def results_of(folder: Path, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Metrics and seconds of each round of each method, and of the base as round 0."""
    found = [{"method": "base", "round": 0, "metrics": _metrics(folder / "base.json"), "seconds": {}}]
    for method in methods:
        history = [json.loads(line) for line in (folder / method / "stages.jsonl").read_text().splitlines()]
        for results in sorted((folder / method).glob("round-*/results.json")):
            number = int(results.parent.name.removeprefix("round-"))
            seconds = {entry["stage"]: entry["seconds"] for entry in history if entry["round"] == number}
            selected = results.with_name("groups.jsonl.summary.json")
            pairs = json.loads(selected.read_text())["num_pairs"] if selected.exists() else None
            one = {"method": method, "round": number, "metrics": _metrics(results), "seconds": seconds, "pairs": pairs}
            found.append(one)
    return found


def _metrics(results: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads(results.read_text(encoding="utf-8"))["metrics"]
    return {name: metrics[name] for name in METRICS.values()}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    output = options.output.resolve()
    quiet_libraries()
    use_one_thread()
    os.environ["HF_HUB_OFFLINE"] = "1"
    methods = [name for name in options.methods.split(",") if name] or list(COMPARED)
    sizes = sizes_of(options.quick)[0]
    folders = {seed: output / f"seed-{seed}" for seed in range(options.seeds)}
    worlds = {seed: prepare(folder, seed, options.quick) for seed, folder in folders.items()}
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(evaluate_base, folders[seed], worlds[seed], sizes.recipe) for seed in folders]
        jobs += [pool.submit(run_method, folders[s], worlds[s], method, sizes) for s in folders for method in methods]
        for job in jobs:
            job.result()
    rows = [{"seed": seed, **row} for seed, folder in folders.items() for row in results_of(folder, methods)]
    tree = {"machine": machine_of_run(), "seeds": list(folders), "steps": sizes.steps, "rounds": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"{table(summary(rows))}\n\nwritten: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
