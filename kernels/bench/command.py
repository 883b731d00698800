"""Times the operations against PyTorch and other libraries, after their tests and each provider's result pass.

    python kernels/bench.py [linear_logprob logprob_gather preference_loss linear_preference_loss ...]
        [--shapes llava-1.5-7b qwen2.5-vl-7b llama-3-8b smollm] [--rows 2048] [--providers bpo eager]
        [--variants frozen] [--logits random peaked] [--dtype bf16] [--json FILE] [--profile DIR]

`bpo bench kernels` is the same command. Runs from a clone, on CUDA (Triton) or on a CPU (plain PyTorch; CPU times do
not predict GPU times, but peak bytes and FLOPs apply to both). If an operation's tests fail, nothing is reported and
the exit status is 1. A provider that cannot run, or whose result differs from fp32, gets a line with the reason instead
of times.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bpo_kernels import dispatch
from bpo_kernels.bench import measure
from bpo_kernels.bench.cases import (
    DTYPES,
    LOGITS,
    ON_REQUEST,
    OPERATIONS,
    SHAPES,
    TEST_FILES,
    VARIANTS,
    Case,
    gemm_flops,
    make_cases,
)
from bpo_kernels.bench.measure import ROOT, Result, machine
from bpo_kernels.bench.providers import PROVIDER_NAMES

COLUMNS: tuple[str, ...] = ("operation", "shape", "rows", "logits", "provider", "ms (p20-p80)")
COLUMNS += ("TFLOP/s", "of GEMM", "GB/s", "of copy", "peak MiB", "GEMMs")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def tests_pass(operation: str, device: torch.device) -> bool:
    """Runs the tests of an operation on `device` and prints their output if they fail."""
    paths = [ROOT / "tests" / "kernels" / name for name in TEST_FILES[operation]]
    for path in paths:
        if not path.exists():
            print(f"{path} is missing: run the benchmark from a clone of the repository", file=sys.stderr)
            return False
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, paths)]
    environment = os.environ | {"KERNEL_TEST_DEVICE": device.type}
    if device.type == "cuda":
        environment["BPO_KERNELS"] = dispatch.chosen_implementation(torch.empty(0, device=device))
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if outcome.returncode:
        print(outcome.stdout[-4000:], outcome.stderr[-2000:], file=sys.stderr)
    return outcome.returncode == 0


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table_row(result: Result, one_gemm_flops: int) -> str:
    """One Markdown row; without times it contains the reason."""
    label = f"{result.operation} {result.variant}".removesuffix(" gradient")
    start = f"| {label} | {result.shape} | {result.num_rows} | {result.logits} | {result.provider} |"
    if result.status != "ok":
        return f"{start} {result.status}: {result.note} | | | | | | |"
    gemms = result.counted_flops / one_gemm_flops if result.counted_flops else None
    cells = (
        f"{result.median_ms:.3f} ({result.p20_ms:.3f}-{result.p80_ms:.3f})",
        _number(result.tflop_per_s, ".3g"),
        _number(result.gemm_share, ".0%"),
        _number(result.gb_per_s, ".4g"),
        _number(result.copy_share, ".0%"),
        _number(None if result.peak_bytes is None else result.peak_bytes / 2**20, ".1f"),
        _number(gemms, ".3g"),
    )
    return " | ".join((start.removesuffix(" |"), *cells)) + " |"


def run_cases(
    cases: list[Case],
    measure: Callable[[Case], list[Result]],
    seconds: float | None,
    save: Callable[[list[Result], list[str]], None],
) -> None:
    """Measures and prints each case; starts none after `seconds`.

    `save` receives the results so far, and a line for each case that was not run.
    """
    results: list[Result] = []
    not_run: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    deadline = None if seconds is None else time.monotonic() + seconds
    for position, case in enumerate(cases):
        # If the process is ended early, the report lists the remaining cases.
        save(results, [*not_run, *(f"{later.label}: not reached" for later in cases[position:])])
        reason = case.why_impossible()
        if reason is None and deadline is not None and time.monotonic() > deadline:
            reason = f"the {seconds:g} s of --seconds had passed"
        if reason is not None:
            not_run.append(f"{case.label}: {reason}")
            print(f"not run: {not_run[-1]}", flush=True)
            continue
        lines = measure(case)
        results += lines
        for result in lines:
            # A skipped provider is printed once per operation, not once per case; the JSON has every line.
            reason_seen = (result.operation, result.provider, result.note)
            if result.status != "skipped" or reason_seen not in seen:
                print(table_row(result, gemm_flops(case)), flush=True)
            seen.add(reason_seen)
    save(results, not_run)


def _parser() -> argparse.ArgumentParser:
    name = "bpo bench kernels" if Path(sys.argv[0]).name == "bpo" else None
    parser = argparse.ArgumentParser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"default: {' '.join(OPERATIONS)}")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: smollm on a CPU, else LLaVA and Qwen")
    parser.add_argument("--rows", nargs="+", type=int, help="response tokens; default: 256 on a CPU, else 2048")
    every_variant = tuple(dict.fromkeys(name for names in VARIANTS.values() for name in names))
    parser.add_argument(
        "--variants", nargs="+", choices=every_variant, help=f"default: all but {', '.join(ON_REQUEST)}"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDER_NAMES, help="default: all of the operation")
    parser.add_argument(
        "--logits", nargs="+", choices=LOGITS, default=list(LOGITS), help="peaked: targets of mean probability 0.45"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--budget-mib", type=int, help="MiB of logits at a time in bpo; default: the device's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a profiler trace per case and provider")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument("--seconds", type=float, help="start no case after this time; the rest is listed")
    parser.add_argument("--sample-seconds", type=float, default=1.0, help="minimum time per provider (default 1)")
    parser.add_argument(
        "--without-tests", action="store_true", help="skip the tests (benchmarks/gpu.py runs them itself)"
    )
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for operation in options.operations:
        if operation not in OPERATIONS:
            parser.error(f"unknown operation {operation!r}: use {', '.join(OPERATIONS)}")
    if min(options.rows or [1]) < 1:
        parser.error(f"--rows {min(options.rows)}: use at least 1")
    if options.budget_mib is not None and options.budget_mib < 1:
        parser.error(f"--budget-mib {options.budget_mib}: use at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU is available")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    operations = options.operations or list(OPERATIONS)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bf16" if on_cuda else "fp32")]
    about = machine(device)
    for operation in [] if options.without_tests else operations:
        print(f"tests of {operation} ...", flush=True)
        if not tests_pass(operation, device):
            print(f"the tests of {operation} fail: nothing is reported", file=sys.stderr)
            return 1
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print("device times" if on_cuda else "CPU times: they do not predict GPU times; peak bytes and GEMMs apply to both")
    value_limit, gradient_limit = measure.TOLERANCES[dtype]
    print(f"agreement with fp32: values within {value_limit:g} nat, gradients within {gradient_limit:g} (Frobenius)")
    print(HEADER)
    shapes = options.shapes or (["llava-1.5-7b", "qwen2.5-vl-7b"] if on_cuda else ["smollm"])
    rows = options.rows or [2048 if on_cuda else 256]
    budget_bytes = None if options.budget_mib is None else options.budget_mib << 20
    cases = [
        case
        for operation in operations
        for case in make_cases(operation, shapes, rows, options.logits, dtype, device, budget_bytes, options.variants)
    ]
    tests = "not run here" if options.without_tests else "passed"

    def save(results: list[Result], not_run: list[str]) -> None:
        if options.json is None:
            return
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = about | {"dtype": str(dtype), "tests": tests, "not_run": not_run}
        report["results"] = [asdict(result) for result in results]
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(options.json)

    measure_case = functools.partial(
        measure.measure,
        providers=options.providers or list(PROVIDER_NAMES),
        profile_dir=options.profile,
        sample_seconds=options.sample_seconds,
    )
    run_cases(cases, measure_case, options.seconds, save)
    return 0
