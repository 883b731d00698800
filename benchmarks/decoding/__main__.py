"""Compares decodings of the demo's base model and of the one trained by BPO, on the demo's unbiased scenes.

    python -m benchmarks.decoding --output runs/decoding [--seeds 3]

Worlds, base models and groups are those of `benchmarks.methods`, and found in its folder if it is the same. Each result
is a file in OUTPUT/decoding: a restart goes on with the first one that is missing, and calls for different seeds may
run at the same time. Writes the results and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.decoding.cells import DECODINGS, FIGURES, MODELS, run_cell
from benchmarks.methods.cells import Comparison, prepare
from benchmarks.synthetic import machine_of_run
from bpo import engine
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.tools.demo.base import BaseConfig
from bpo.tools.demo.environment import quiet_libraries, use_one_thread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "decoding-cpu.json"
SAME_HALF = "plain, on the grid's half"
QUICK = Comparison(
    num_annotations=48,
    num_evaluation_scenes=12,
    groups_per_step=8,
    steps=3,
    base_config=BaseConfig(tower_steps=20, steps=40),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/decoding"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help=f"file for the results (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--quick", action="store_true", help="a small world, 1 seed; results in OUTPUT")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.quick:
        options.seeds, options.json = 1, options.json or options.output / "results.json"
    return options


def summary(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and decoding: median, least and most of each figure over the seeds, and what it costs."""
    rows = []
    for model in MODELS:
        for decoding in DECODINGS:
            own = [cell for cell in cells if (cell["model"], cell["decoding"]) == (model, decoding)]
            row: dict[str, Any] = {"model": model, "decoding": decoding, "seeds": [cell["seed"] for cell in own]}
            row |= _figures([cell["metrics"] for cell in own])
            row["relative_forward_passes"] = statistics.median(c["cost"]["relative_forward_passes"] for c in own)
            row["runs"] = own[0].get("runs", 1)
            row["seconds"] = statistics.median(cell["seconds"] for cell in own)
            rows.append(row)
            if decoding == "grid":
                row["grid"] = {str(cell["seed"]): cell["grid"] for cell in own}
                rows.append(row | {"decoding": SAME_HALF, "runs": 1} | _figures([cell["plain"] for cell in own]))
    return rows


def _figures(metrics: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Column -> median, least and most of those that have its metric."""
    found = {}
    for column, metric in FIGURES.items():
        if values := sorted(of_seed[metric] for of_seed in metrics if metric in of_seed):
            found[column] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures in percent, median (least to most). Those of the grid are of the half that did not choose the setting."""
    head = ["model", "decoding", *FIGURES, "forward passes", "s"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        figures = [_percent(row[column]) if column in row else "-" for column in FIGURES]
        passes = f"x{row['relative_forward_passes']:.1f}" + (f", {row['runs']} runs" if row["runs"] > 1 else "")
        cells = [row["model"], row["decoding"], *figures, passes, f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(entry: dict[str, float]) -> str:
    middle, least, most = (100 * entry[key] for key in ("median", "least", "most"))
    return f"{middle:.1f}" if least == most else f"{middle:.1f} ({least:.1f} to {most:.1f})"


def _same_sizes(output: Path, sizes: Comparison) -> bool:
    """Whether the folder is new, or of a comparison with the same sizes, which it records."""
    path = output / "sizes.json"
    tree = {key: value for key, value in asdict(sizes).items() if key != "num_ranks"}
    if path.exists():
        return bool(json.loads(path.read_text(encoding="utf-8")) == tree)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return True


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    output, sizes = options.output.resolve(), QUICK if options.quick else Comparison()
    quiet_libraries()
    use_one_thread()
    logging.basicConfig(level=logging.WARNING)
    if not _same_sizes(output, sizes):
        print(f"--output {output}: it has results of other sizes; give another folder", file=sys.stderr)
        return 2
    engine.init_distributed(Ranks())
    cells = []
    for number in range(options.seed, options.seed + options.seeds):
        seed = prepare(output, sizes, number)
        for model in MODELS:
            for decoding in DECODINGS:
                started = time.monotonic()
                cells.append(run_cell(output, sizes, seed, model, decoding))
                print(f"seed {number}, {model}, {decoding}: {time.monotonic() - started:.1f} s", flush=True)
    collectives.shut_down()
    rows = summary(cells)
    command = shlex.join(["python", "-m", "benchmarks.decoding", *(sys.argv[1:] if argv is None else argv)])
    seeds = sorted({cell["seed"] for cell in cells})
    tree = {"machine": machine_of_run(), "command": command, "sizes": asdict(sizes), "seeds": seeds, "rows": rows}
    path = options.json or RESULTS
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"{table(rows)}\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
