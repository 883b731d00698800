"""Every GPU test, a training step beside TRL's and every kernel benchmark on one GPU, within ten minutes: `make gpu`,
or python benchmarks/gpu.py

    [--seconds 600] [--out benchmarks/results]
    --device cpu --quick --out DIR      rehearses the whole script over tiny shapes where there is no GPU

Writes OUT/gpu-DEVICE-DATE.json (machine, versions, commit, verdicts on the targets, every result) and prints the same
as Markdown for the docs. What did not fit the time is listed as not run. Exit status: 0 measured, whether or not a
target is met; 1 a test or a benchmark failed, and after red tests nothing is measured; 2 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bpo.bench.report import table as step_table
from bpo_kernels.bench import HEADER, table_row
from bpo_kernels.bench_cases import DTYPES, Case, gemm_flops
from bpo_kernels.bench_measure import Result, machine

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 600.0
# Kept for the report itself, so that the whole stays below the total.
RESERVE_SECONDS = 10.0
# A benchmark stops by itself before it is stopped; a case in progress gets this long to end.
GRACE_SECONDS = 20.0
TEST_SHARE = 0.4
# A 7B model is drawn, written once and read by both providers; the rest of the time belongs to the kernels.
STEP_SHARE = 0.25
STEP_NAME = "bpo bench step"
ATTENTION_NAME = "attention over packed groups"
MEMORY_NAME = "the memory model of bpo plan"
MEMORY_SECONDS = 60.0
TARGET_SHAPES = ("llava-1.5-7b", "qwen2.5-vl-7b")
TARGET_ROWS = 2048


@dataclass(frozen=True)
class Part:
    """One process: the GPU tests, or kernels/bench.py with these arguments."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a part ended: passed, failed, stopped (by the deadline) or not run."""

    name: str
    status: str
    seconds: float
    output_tail: str = ""


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; `met` is None where nothing was."""

    target: str
    measured: str
    met: bool | None


def benchmark_parts(quick: bool) -> list[Part]:
    """The processes in order of worth: what the targets speak of first."""
    main_shapes, all_shapes = list(TARGET_SHAPES), [*TARGET_SHAPES, "llama-3-8b"]
    main_rows, other_rows, many_rows = [TARGET_ROWS], [1, 128, 8192], [1, 128, 2048, 8192, 1 << 22]
    if quick:
        main_shapes = all_shapes = ["tiny"]
        main_rows, other_rows, many_rows = [32], [1, 8], [1, 64]
    sampled = ("--sample-seconds", "0" if quick else "0.2")
    # Compilation takes longer than all the rest, and our modes differ in nothing that other rows would show.
    few = ("--providers", "bpo", "eager", "torch-chunked", "liger", "liger-dpo", "cce", "quack", "--logits", "peaked")
    plain = ("--providers", "bpo", "eager") if quick else ()

    def part(operation: str, shapes: list[str], rows: list[int], *options: str) -> Part:
        words = ("--shapes", *shapes, "--rows", *map(str, rows))
        title = f"{operation} {' '.join(shapes)} N={','.join(map(str, rows))}"
        return Part(title, (operation, *words, *sampled, *options))

    return [
        part("linear_logprob", main_shapes, main_rows, *plain),
        part("linear_preference_loss", main_shapes, main_rows, *plain),
        part("logprob_gather", all_shapes, [*main_rows, *other_rows], *plain),
        part("preference_loss", main_shapes, many_rows, *plain),
        part("linear_logprob", ["tiny"] if quick else ["llama-3-8b"], main_rows, *few),
        part("linear_logprob", all_shapes, other_rows, *few),
        part("linear_preference_loss", all_shapes, other_rows, *few),
    ]


def run_part(name: str, command: list[str], seconds: float, **environment: str) -> Outcome:
    """Runs `command` in its own process group and ends the whole group when `seconds` have passed."""
    begin = time.monotonic()
    if seconds <= 0:
        return Outcome(name, "not run", 0.0, "no time was left")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped"
        finally:
            # The group outlives its leader where a test or a compiler left a process behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return Outcome(name, status, round(time.monotonic() - begin, 1), output.read()[-4000:])


def run_benchmarks(
    parts: list[Part], device: str, tested: bool, time_left: Callable[[], float]
) -> tuple[list[Outcome], list[Result], list[str]]:
    """Every part that there is time for; the outcomes, the results, and a line for each case that was not run."""
    outcomes: list[Outcome] = []
    results: list[Result] = []
    not_run: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            report = Path(folder) / f"{number}.json"
            seconds = time_left()
            command = [sys.executable, "kernels/bench.py", *part.arguments, "--device", device, "--json", str(report)]
            command += ["--seconds", f"{max(0.0, seconds - GRACE_SECONDS):.1f}"]
            command += ["--without-tests"] if tested else []
            outcomes.append(run_part(part.name, command, seconds))
            print(f"{part.name}: {outcomes[-1].status} in {outcomes[-1].seconds:.0f} s", flush=True)
            if report.exists():
                content = json.loads(report.read_text())
                results += [Result(**line) for line in content["results"]]
                not_run += content["not_run"]
            else:
                not_run.append(f"{part.name}: {outcomes[-1].status}, no case was reached")
    return outcomes, results, not_run


def step_arguments(quick: bool) -> list[str]:
    """Options of `bpo bench step`: the whole LLaVA-1.5-7B, pairs before groups of three."""
    if quick:
        lengths = ["--image-tokens", "4", "--prompt-tokens", "24", "--answer-tokens", "8"]
        return ["--model", "llava-1.5-7b-32nd", *lengths, "--completions", "2", "--repetitions", "1"]
    return ["--model", "llava-1.5-7b", "--completions", "2", "3", "--num-groups", "4"]


def run_step(quick: bool, seconds: float) -> tuple[Outcome, dict | None, list[Verdict]]:
    """A training step beside TRL's: the outcome, what `bpo bench step` reported, and its verdicts."""
    if importlib.util.find_spec("trl") is None:
        why = "trl is not installed: pip install --constraint constraints.txt 'bpo[bench]'"
        return Outcome(STEP_NAME, "not run", 0.0, why), None, []
    with tempfile.TemporaryDirectory() as folder:  # where the benchmark is stopped, its model goes with this folder
        report = Path(folder) / "step.json"
        command = [sys.executable, "-m", "bpo.cli", "bench", "step", *step_arguments(quick), "--json", str(report)]
        outcome = run_part(STEP_NAME, command, seconds, TMPDIR=folder)
        content = json.loads(report.read_text()) if report.exists() else None
    cases = content["cases"] if content else []
    return outcome, content, [Verdict(**one) for case in cases for one in case["targets"]]


def run_attention(device: str, quick: bool, seconds: float) -> tuple[Outcome, dict | None]:
    """The backends of packed attention beside separate sequences: the outcome, and what was reported."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "attention.json"
        command = [sys.executable, "-m", "benchmarks.attention", "--device", device, "--json", str(report)]
        command += ["--seconds", f"{max(0.0, seconds - GRACE_SECONDS):.1f}", *(["--quick"] if quick else [])]
        outcome = run_part(ATTENTION_NAME, command, seconds)
        return outcome, json.loads(report.read_text()) if report.exists() else None


def run_memory(quick: bool, seconds: float) -> tuple[Outcome, dict | None]:
    """The memory model of `bpo plan` beside measured peaks: the outcome (failed above 10 %), and what was reported."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "memory.json"
        command = [sys.executable, "benchmarks/memory_check.py", "--json", str(report)]
        outcome = run_part(MEMORY_NAME, [*command, *(["--only", "llava-lora-zero2"] if quick else [])], seconds)
        return outcome, json.loads(report.read_text()) if report.exists() else None


def _of(results: list[Result], provider: str, **labels: str | int) -> list[Result]:
    return [
        result
        for result in results
        if result.provider == provider
        and result.status == "ok"
        and all(getattr(result, name) == value for name, value in labels.items())
    ]


def _same_case(result: Result) -> dict[str, str | int]:
    return {name: getattr(result, name) for name in ("operation", "variant", "shape", "num_rows", "logits")}


def _speed_ups(results: list[Result], other: str, **labels: str | int) -> list[float]:
    """How many times faster ours is than `other`, case by case, where both were timed."""
    pairs = ((ours, _of(results, other, **_same_case(ours))) for ours in _of(results, "bpo", **labels))
    return [theirs[0].median_ms / ours.median_ms for ours, theirs in pairs if theirs and theirs[0].median_ms]


def _verdict(target: str, values: list[float], least: float, form: str) -> Verdict:
    """The worst of `values` against `least`."""
    if not values:
        return Verdict(target, "not measured", None)
    return Verdict(target, format(min(values), form), min(values) >= least)


def judge(results: list[Result]) -> list[Verdict]:
    """The targets of one H100, each on the worst case (both kinds of logits) that it speaks of."""
    verdicts = []
    for shape in TARGET_SHAPES:
        frozen = {"operation": "linear_logprob", "variant": "frozen", "shape": shape, "num_rows": TARGET_ROWS}
        where = f"linear_logprob frozen, {shape}, N={TARGET_ROWS}"
        shares = [result.gemm_share for result in _of(results, "bpo", **frozen) if result.gemm_share is not None]
        verdicts.append(_verdict(f"{where}: >= 85 % of the measured GEMM roofline", shares, 0.85, ".1%"))
        for other, least in (("cce", 1.6), ("quack", 1 / 1.05)):
            words = "within 5 % of quack" if other == "quack" else f">= {least:g}x {other}"
            verdicts.append(_verdict(f"{where}: {words}", _speed_ups(results, other, **frozen), least, ".2f"))
        loss = frozen | {"operation": "linear_preference_loss", "variant": "live-frozen"}
        target = (
            f"linear_preference_loss live-frozen, {shape}, N={TARGET_ROWS}: >= 8x Liger's fused DPO with its prompts"
        )
        verdicts.append(_verdict(target, _speed_ups(results, "liger-dpo", **loss), 8.0, ".2f"))
    for operation in ("logprob_gather", "preference_loss"):
        lines = _of(results, "bpo", operation=operation)
        most = max((line.num_rows for line in lines), default=0)
        shares = [line.copy_share for line in lines if line.num_rows == most and line.copy_share is not None]
        where = f"{operation}, N={most}" if lines else operation
        verdicts.append(_verdict(f"{where}: >= 90 % of the bandwidth of a copy of its bytes", shares, 0.9, ".1%"))
    verdicts.append(_verdict("nothing slower than PyTorch eager", _speed_ups(results, "eager"), 1.0, ".2f"))
    return verdicts


def markdown(report: dict, results: list[Result], verdicts: list[Verdict]) -> str:
    """The tables for the docs."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items() if value)
    lines = [f"{report['date']}, {about}", "", "| target | measured (worst case) | met |", "|---|---|---|"]
    lines += [f"| {verdict.target} | {verdict.measured} | {words[verdict.met]} |" for verdict in verdicts]
    lines += [f"\n{step_table(case)}" for case in (report["step"] or {"cases": []})["cases"]]
    lines += ["", HEADER]
    for result in results:
        shape = result.shape or "tiny"
        case = Case(result.operation, result.variant, shape, result.num_rows, "", DTYPES["bf16"], torch.device("cpu"))
        lines.append(table_row(result, gemm_flops(case)))
    lines += ["", "Not run:" if report["not_run"] else "Not run: nothing."]
    return "\n".join([*lines, *(f"- {line}" for line in report["not_run"])])


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one sample: a rehearsal")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything together (default 600)")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU to measure")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not (options.quick and options.out):
        parser.error("--device cpu is a rehearsal: give --quick, and --out DIR for a report that is no measurement")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: use a positive number")
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    begin = time.monotonic()
    options = _options(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA GPU here: nothing was run (--device cpu --quick --out DIR rehearses the script)", file=sys.stderr
        )
        return 2
    if options.check:
        return 0
    device = torch.device(options.device)

    def time_left() -> float:
        return options.seconds - RESERVE_SECONDS - (time.monotonic() - begin)

    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    tests = run_part("pytest -m gpu", command, min(TEST_SHARE * options.seconds, time_left()))
    print(tests.output_tail, f"GPU tests: {tests.status} in {tests.seconds:.0f} s", sep="\n", flush=True)
    if tests.status == "failed":
        print("the GPU tests fail: nothing is reported", file=sys.stderr)
        return 1
    step, step_report, verdicts = run_step(options.quick, min(STEP_SHARE * options.seconds, time_left()))
    print(step.output_tail, f"{STEP_NAME}: {step.status} in {step.seconds:.0f} s", sep="\n", flush=True)
    attention, attention_report = run_attention(options.device, options.quick, time_left())
    print(f"{ATTENTION_NAME}: {attention.status} in {attention.seconds:.0f} s", flush=True)
    memory, memory_report = run_memory(options.quick, min(MEMORY_SECONDS, time_left()))
    print(f"{MEMORY_NAME}: {memory.status} in {memory.seconds:.0f} s", flush=True)
    parts = benchmark_parts(options.quick)
    # Where the tests did not end in time, each benchmark runs those of its operation first.
    outcomes, results, not_run = run_benchmarks(parts, options.device, tests.status == "passed", time_left)
    verdicts += judge(results if device.type == "cuda" else [])
    now = datetime.datetime.now(datetime.timezone.utc)
    report = {
        "date": now.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "parts": [asdict(outcome) for outcome in (tests, step, attention, memory, *outcomes)],
        "not_run": [
            f"{part.name}: {part.status}" for part in (tests, step, attention, memory) if part.status != "passed"
        ]
        + not_run,
        "targets": [asdict(verdict) for verdict in verdicts],
        "results": [asdict(result) for result in results],
        "step": step_report,
        "attention": attention_report,
        "memory": memory_report,
    }
    name = re.sub(r"[^a-z0-9]+", "-", str(report["machine"]["device"]).lower()).strip("-")
    path = (options.out or ROOT / "benchmarks" / "results") / f"gpu-{name}-{now:%Y%m%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(markdown(report, results, verdicts), f"\n{path}: {time.monotonic() - begin:.0f} s in all", sep="\n")
    return 1 if any(outcome.status == "failed" for outcome in (step, attention, memory, *outcomes)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
