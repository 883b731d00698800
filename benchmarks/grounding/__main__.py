"""Does preference training on bootstrapped answers ground a model better than fine-tuning, and with which negatives?

    python -m benchmarks.grounding --output runs/grounding [--seeds 5] [--workers 2]

Builds the base model (`base.py`), makes negatives of every source for the same records, tunes every arm on the same
number of settings on validation scenes, and trains and tests it with the seeds. Writes OUTPUT/report.md and
OUTPUT/results.json. A restart goes on with the first unfinished run. Each run is a process with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.grounding.arms import ARM_OF, ARMS, Arm, Setting, grid_of, seeds_of, tuning_seed_of
from benchmarks.grounding.pictures import check_sources

ROOT = Path(__file__).resolve().parents[2]


def stage(root: Path, *arguments: str) -> None:
    """Runs a stage in a process of its own; its output goes to OUTPUT/logs.

    Raises:
        RuntimeError: The stage failed; names its log.
    """
    (root / "logs").mkdir(parents=True, exist_ok=True)
    log = root / "logs" / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', '-'.join(arguments))}.log"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "checkout"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "benchmarks.grounding.stages", arguments[0], str(root), *arguments[1:]]
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if status:
        raise RuntimeError(f"{' '.join(arguments)} failed with status {status}; read {log}")
    print(f"{' '.join(arguments)}: {time.monotonic() - started:.0f} s", flush=True)


def arm_stage(root: Path, arm: Arm, setting: Setting, seed: int, split: str) -> None:
    if not score_path(root, arm.name, setting.name, seed, split).exists():
        point = json.dumps([setting.lr, setting.beta, setting.chosen_weight])
        stage(root, "arm", arm.name, point, str(seed), split)


def score_path(root: Path, arm: str, setting: str, seed: int, split: str) -> Path:
    return root / "scores" / f"{arm}-seed{seed}-{setting}-{split}.json"


def tuned(root: Path, arm: Arm) -> Setting:
    """The setting with the fewest wrong facts on the validation scenes."""

    def wrong(setting: Setting) -> float:
        path = score_path(root, arm.name, setting.name, tuning_seed_of(arm), "validation")
        return float(json.loads(path.read_text(encoding="utf-8"))["figures"]["wrong"])

    return min(grid_of(arm), key=wrong)


def run(root: Path, arms: Sequence[Arm], seeds: int, workers: int) -> None:
    stage(root, "base")
    with ThreadPoolExecutor(workers) as pool:

        def negatives(needed: set[int]) -> None:
            list(pool.map(lambda seed: stage(root, "negatives", str(seed)), sorted(needed)))

        negatives({tuning_seed_of(arm) for arm in arms})

        def tune(arm: Arm) -> None:  # one after the other: they share the store of reference log-probs
            for setting in grid_of(arm):
                arm_stage(root, arm, setting, tuning_seed_of(arm), "validation")

        list(pool.map(tune, arms))
        tests = sorted((seed, arm.name) for arm in arms for seed in seeds_of(arm, arms, seeds))
        negatives({seed for seed, _ in tests})

        def test(seed_and_name: tuple[int, str]) -> None:
            seed, arm = seed_and_name[0], ARM_OF[seed_and_name[1]]
            arm_stage(root, arm, tuned(root, arm), seed, "test")

        list(pool.map(test, tests))
    stage(root, "measure")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/grounding"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARM_OF), default=list(ARM_OF), help="(default: all)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--report-only", action="store_true", help="only report the finished runs")
    options = parser.parse_args()
    check_sources()
    root = options.output.resolve()
    if not options.report_only:
        run(root, [arm for arm in ARMS if arm.name in options.arms], options.seeds, options.workers)
    from benchmarks.grounding.analysis import write_report

    print(write_report(root, options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
