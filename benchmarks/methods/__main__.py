"""Compares the methods of bpo/recipes/methods/ on the demo's world, with the demo's optimisation for all of them.

    python -m benchmarks.methods --output runs/methods [--seeds 3] [--methods mdpo,ipo] [--steps 93] [--workers 2]

Per seed, world, base model and bootstrapped groups are made once. Each method is trained as published, and with the
demo's likelihood term added unless it has one itself, and evaluated by CHAIR on unbiased scenes. Each result is a file
in OUTPUT/cells: a restart goes on with the first one that is missing. Writes the results and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.methods.cells import BASE, RECIPES, Comparison, cell_path, columns_of, finished_cell, prepare, run_cell
from benchmarks.methods.report import summary, table
from benchmarks.synthetic import machine_of_run
from bpo import engine
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.tools.demo.base import BaseConfig
from bpo.tools.demo.environment import quiet_libraries, use_one_thread
from bpo.tools.demo.methods import method_names

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "methods-cpu.json"
QUICK_METHODS = "dpo,mdpo"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/methods"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--methods", default="", help="names separated by commas (default: all)")
    parser.add_argument("--steps", type=int, default=0, help="steps of each training (default: the demo's)")
    parser.add_argument("--workers", type=int, default=1, help="seeds at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help=f"file for the results (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--quick", action="store_true", help=f"a small world, 1 seed, 3 steps, {QUICK_METHODS}")
    options = parser.parse_args(argv)
    if min(options.seeds, options.workers) < 1 or options.steps < 0:
        parser.error("--seeds and --workers must be at least 1, --steps at least 0")
    if options.quick:
        options.seeds, options.steps = 1, 3
        options.methods = options.methods or QUICK_METHODS
        options.json = options.json or options.output / "results.json"
    return options


def run_seed(options: argparse.Namespace, number: int, names: list[str]) -> None:
    """Finishes the cells of a seed."""
    todo = [(name, column) for name in [BASE, *names] for column in columns_of(name)]
    sizes = _sizes(options)
    if all(finished_cell(options.output, sizes, *cell, number) for cell in todo):
        return
    seed = prepare(options.output, sizes, number)
    for name, column in todo:
        started = time.monotonic()
        cell = run_cell(options.output, sizes, seed, name, column)
        result = f"CHAIR_i {100 * cell['chair_i']:.1f}" if "chair_i" in cell else cell["failed"]
        print(f"seed {number}, {name}, {column}: {result}, {time.monotonic() - started:.1f} s", flush=True)


def _sizes(options: argparse.Namespace) -> Comparison:
    sizes = Comparison()
    if options.quick:
        small = BaseConfig(tower_steps=20, steps=40)
        sizes = Comparison(num_annotations=48, num_evaluation_scenes=12, groups_per_step=8, base_config=small)
    return replace(sizes, steps=options.steps or sizes.steps)


def _same_sizes(options: argparse.Namespace) -> bool:
    """Whether the folder is new, or of a comparison with the same sizes, which it records."""
    path = options.output / "sizes.json"
    tree = {key: value for key, value in asdict(_sizes(options)).items() if key != "num_ranks"}
    if path.exists():
        return bool(json.loads(path.read_text(encoding="utf-8")) == tree)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return True


def run_in_processes(options: argparse.Namespace, names: list[str]) -> None:
    """Several seeds at a time, each in a process of its own.

    Raises:
        subprocess.CalledProcessError: One of them failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.methods", "--output", str(options.output), "--seeds", "1"]
    command += ["--methods", ",".join(names), "--steps", str(options.steps)]

    def start(number: int) -> None:
        results = options.output / f"seed-{number}.json"
        more = ["--seed", str(number), "--json", str(results)]
        subprocess.run([*command, *more], check=True, env=environment, cwd=ROOT, stdout=sys.stderr)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(start, _seeds(options)))


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.seeds)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.output = options.output.resolve()
    quiet_libraries()
    use_one_thread()
    logging.basicConfig(level=logging.WARNING)
    names = [name for name in options.methods.split(",") if name] or list(RECIPES)
    unknown = sorted(set(names) - RECIPES.keys())
    if unknown:
        print(f"--methods: no recipe {', '.join(unknown)}; there are {', '.join(sorted(RECIPES))}", file=sys.stderr)
        return 2
    names = method_names({name: RECIPES[name] for name in names})
    if not _same_sizes(options):
        print(f"--output {options.output}: it has results of other sizes; give another folder", file=sys.stderr)
        return 2
    if options.workers > 1 and options.seeds > 1:
        run_in_processes(options, names)
    else:
        engine.init_distributed(Ranks())
        for number in _seeds(options):
            run_seed(options, number, names)
        collectives.shut_down()
    write_report(options, names)
    return 0


def write_report(options: argparse.Namespace, names: list[str]) -> None:
    paths = [
        cell_path(options.output, name, column, number)
        for name in [BASE, *names]
        for column in columns_of(name)
        for number in _seeds(options)
    ]
    found = summary([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    sizes = json.loads((options.output / "sizes.json").read_text(encoding="utf-8"))
    tree = {"machine": machine_of_run(), "sizes": sizes, "seeds": list(_seeds(options)), "methods": found}
    path = options.json or RESULTS
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"{table(found)}\n\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(main())
