"""Runs all GPU tests, the kernel benchmarks for the targets, attention, a training step against TRL's and the memory
model, on one GPU and within nine minutes: `make gpu`, or

    python benchmarks/gpu.py [--seconds 540] [--out DIR] [--only PART ...] [--skip-done]
    python benchmarks/gpu.py --list                               lists the parts, in order
    python benchmarks/gpu.py --device cpu --quick --out DIR       dry run of every part without a GPU
    python benchmarks/gpu.py --report FILE.json [FILE.json ...]   renders existing reports, merged into one

Writes OUT/gpu-DEVICE-DATE.json after each part, and the same as a Markdown page: device, versions, commit, the targets
with predictions and measurements, all figures, and what was not run and why. A part that fails blocks only the parts
that need it. With --only and --skip-done the parts are added to the newest report of the same device and commit in
--out. Exit status: 0 measured, whether or not a target is met; 1 a part failed; 2 no GPU.
"""

from __future__ import annotations

import time

BEGIN = time.monotonic()

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def _make_importable() -> None:
    """Makes the sources importable without an installation, here and in every process started from here."""
    folders = [str(ROOT)] + ([] if importlib.util.find_spec("bpo_kernels") else [str(ROOT / "checkout")])
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    earlier = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*folders, *filter(None, earlier)]))


_make_importable()

import torch  # noqa: E402

from benchmarks.gpu_set import results  # noqa: E402
from benchmarks.gpu_set.parts import Part, Setting, build_parts  # noqa: E402
from benchmarks.gpu_set.process import opened_caches  # noqa: E402
from benchmarks.gpu_set.report import not_run, render  # noqa: E402
from benchmarks.gpu_set.session import Clock, run_parts  # noqa: E402

TOTAL_SECONDS = {"cuda": 540.0, "cpu": 1800.0}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="dry run: tiny shapes, one sample")
    parser.add_argument("--seconds", type=float, help="total time (default 540, dry run 1800)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="only these parts, in the set's order")
    parser.add_argument("--skip-done", action="store_true", help="skip the parts that have already passed")
    parser.add_argument("--list", action="store_true", help="only list the parts")
    parser.add_argument("--check", action="store_true", help="only check that there is a GPU")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="only render these reports")
    options = parser.parse_args(argv)
    only_reads = options.list or options.check or options.report
    if options.device == "cpu" and not only_reads and not (options.quick and options.out):
        parser.error("--device cpu is a dry run: add --quick, and --out DIR for its report, which is no measurement")
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: use a positive number")
    names = [part.name for part in build_parts(Setting(options.device, options.quick))]
    unknown = [name for name in options.only if name not in names]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: no such part; the parts are {', '.join(names)}")
    options.seconds = options.seconds or TOTAL_SECONDS[options.device]
    options.out = options.out or ROOT / "benchmarks" / "results"
    return options


def _listing(parts: list[Part]) -> str:
    lines = [f"{'part':18}{'est. s':>7}{'limit':>7}  what"]
    lines += [f"{part.name:18}{part.estimate_s:7.0f}{part.limit_s:7.0f}  {part.title}" for part in parts]
    return "\n".join(lines)


def _terminate(number: int, frame: Any) -> None:
    """Exits through every `finally`, so that no part outlives this process."""
    raise SystemExit(128 + number)


def run(options: argparse.Namespace, clock: Clock) -> int:
    """Runs the parts and writes the report; returns the exit status."""
    setting = Setting(options.device, options.quick)
    parts = [part for part in build_parts(setting) if not options.only or part.name in options.only]
    report = results.new_report(options.device, options.quick)
    path = results.path_of(report, options.out)
    if (options.only or options.skip_done) and (found := results.earlier(report, options.out)):
        path, report = found

    def save() -> None:
        results.write_report(path, report, render(report))

    signal.signal(signal.SIGTERM, _terminate)
    with tempfile.TemporaryDirectory(prefix="bpo-gpu-", ignore_cleanup_errors=True) as folder:
        with opened_caches(Path(folder)) as caches:
            run_parts(parts, setting, report, clock, caches, Path(folder), save, options.skip_done)
    print(f"\n{render(report)}\n{path}: {time.monotonic() - clock.begin:.0f} s in all; {len(not_run(report))} not run")
    return int(any(report["parts"][part.name]["status"] == "failed" for part in parts))


def main(argv: list[str] | None = None, begin: float | None = None) -> int:
    """Entry point; returns the exit status. `begin`: start time of the process, by `time.monotonic`."""
    options = _options(argv)
    if options.list:
        print(_listing(build_parts(Setting(options.device, options.quick))))
        return 0
    if options.report:
        print(render(results.merge([results.load(path) for path in options.report])))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was run (for a dry run: --device cpu --quick --out DIR)", file=sys.stderr)
        return 2
    if options.check:
        return 0
    return run(options, Clock(time.monotonic() if begin is None else begin, options.seconds))


if __name__ == "__main__":
    raise SystemExit(main(begin=BEGIN))
