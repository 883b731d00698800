"""Cost of training against size: python -m benchmarks.cost [--json FILE] [--images DIR] [--quick] [--parts ...]

Seconds per step against packed tokens; seconds and memory of reading, planning and the reference store against groups.
Each size of the last three runs three times, in a separate process, so that its memory is measured separately; medians.
Writes the figures, their deviation from a straight line, and plots.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cost_parts import PARTS
from benchmarks.plots import Series, plot

TOKENS = [512 << k for k in range(7)]
LONG_TOKENS = [512 << k for k in range(5)]
GROUPS = [1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000]
GROUP_TOKENS = 512


def straightness(sizes: list[int], seconds: list[float]) -> dict[str, float]:
    """Fits the growth of a cost with size.

    Returns:
        `exponent`: slope of log(seconds) over log(size) in the upper half of the sizes. `per_item_s`: slope b of the
        line a + b * size with minimal squared relative error. `fixed_s`: its a. `largest_deviation`: the largest
        relative deviation from it.
    """
    upper = list(zip(sizes, seconds, strict=True))[len(sizes) // 2 :]
    exponent = statistics.linear_regression([math.log(n) for n, _ in upper], [math.log(s) for _, s in upper]).slope
    # Least squares of (a + b n) / s = 1, so that all sizes have the same weight.
    x, y = [1 / s for s in seconds], [n / s for n, s in zip(sizes, seconds, strict=True)]
    xx, yy, xy = (sum(p * q for p, q in zip(u, v, strict=True)) for u, v in ((x, x), (y, y), (x, y)))
    determinant = xx * yy - xy * xy
    a, b = (sum(x) * yy - sum(y) * xy) / determinant, (sum(y) * xx - sum(x) * xy) / determinant
    deviation = max(abs((a + b * n) / s - 1) for n, s in zip(sizes, seconds, strict=True))
    return {"exponent": exponent, "per_item_s": b, "fixed_s": a, "largest_deviation": deviation}


def step_costs(quick: bool) -> dict[str, Any]:
    """CPU seconds of forward, backward and optimizer step, with interleaved sizes; the minimum of four rounds.

    CPU seconds of this process and the minimum, because other jobs on the machine only add time.
    """
    import torch

    from benchmarks.synthetic import config_for, interleaved_seconds, random_batch, small_llava, trainer_of
    from bpo import engine
    from bpo.job.launch import Ranks
    from bpo.training.step import run_step

    engine.init_distributed(Ranks())
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(small_llava(Path(folder) / "model"), Path(folder))
        trainer = trainer_of(config)
    results = {}
    sizes = {"groups of 512 tokens": TOKENS, "one group": LONG_TOKENS}
    for name, tokens in sizes.items():
        tokens = tokens[:3] if quick else tokens
        cases = {}
        for size in tokens:
            shape = (size // GROUP_TOKENS, GROUP_TOKENS // 2) if name != "one group" else (1, size // 2)
            batch = random_batch(trainer.policy, *shape, response_tokens=shape[1] // 2)
            batch = batch.to(trainer.device, trainer.dtype)
            assert batch.input_ids_T.numel() == size

            def step(batch: Any = batch) -> None:
                run_step(trainer, [batch], config, len(batch.loss_inputs.pairs_P2), step=1)
                trainer.step(1.0)

            cases[str(size)] = step
        seconds = interleaved_seconds(cases, 2 if quick else 4, time.process_time)
        least = [min(seconds[str(size)]) for size in tokens]
        results[name] = {"tokens": tokens, "seconds": least, "all_seconds": seconds} | straightness(tokens, least)
    torch.distributed.destroy_process_group()
    return results


def group_costs(part: str, quick: bool) -> dict[str, Any]:
    sizes = GROUPS[:3] if quick else GROUPS
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(1 if quick else 3):
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.cost", "--part", part, "--groups", str(size)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)}: {result.stderr[-2000:]}")
            runs[size].append(json.loads(result.stdout.splitlines()[-1]))
    rows = [{name: statistics.median(run[name] for run in runs[size]) for name in runs[size][0]} for size in sizes]
    figures: dict[str, Any] = {"groups": sizes, "rows": rows}
    timed = [name for name in rows[0] if name.endswith("_s")]
    figures["fits"] = {name: straightness(sizes, [row[name] for row in rows]) for name in timed}
    return figures


def draw(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    series = [
        Series(name, tuple((t / 1024, s) for t, s in zip(figures["tokens"], figures["seconds"], strict=True)))
        for name, figures in results["steps"].items()
        if name != "machine"
    ]
    plot(folder / "cost-steps.svg", "Seconds of a step against packed tokens", "packed tokens, 1024", "s", series)
    lines = []
    for part, name, label in (
        ("groups", "read_s", "read groups.jsonl"),
        ("plan", "plan_s", "plan an epoch, 8 ranks"),
        ("plan", "divide_s", "divide the reference pass"),
        ("store", "write_s", "write the store"),
        ("store", "open_s", "read its index"),
        ("store", "read_s", "read every entry"),
    ):
        rows = zip(results[part]["groups"], results[part]["rows"], strict=True)
        lines.append(Series(label, tuple((n / 1000, row[name]) for n, row in rows)))
    plot(folder / "cost-groups.svg", "Seconds against groups", "groups, 1000", "s", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--images", type=Path, help="folder for the plots")
    parser.add_argument("--quick", action="store_true", help="the three smallest sizes of each")
    parser.add_argument(
        "--parts", nargs="+", choices=["steps", *PARTS], help="measure only these; --json keeps the others"
    )
    parser.add_argument("--part", choices=sorted(PARTS), help="one part at one size, in this process")
    parser.add_argument("--groups", type=int, default=1000, help="its size")
    arguments = parser.parse_args()
    if arguments.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[arguments.part](arguments.groups, Path(folder))))
        return
    from benchmarks.synthetic import machine_of_run

    kept = bool(arguments.json and arguments.json.exists() and arguments.parts)
    results: dict[str, Any] = json.loads(arguments.json.read_text(encoding="utf-8")) if kept else {}
    for part in arguments.parts or ["steps", *PARTS]:
        figures = step_costs(arguments.quick) if part == "steps" else group_costs(part, arguments.quick)
        results[part] = {"machine": machine_of_run()} | figures
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.images:
        draw(results, arguments.images)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
