"""Targets for one H100 or H200: the prediction, the measurement in a report, and whether the target is met.

`judge` depends on the report only. A target is judged on the worst of its cases; if none of them was measured on a GPU
it is "not measured".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_set.parts import GATHER_ROWS, PAIR_LOSS_ROWS, TARGET_ROWS, TARGET_SHAPES
from bpo.tools.bench.report import Verdict, gpu_verdicts
from bpo_kernels.bench.measure import Result

NOT_MEASURED = "not measured"
ROOFLINE, TRL_SPEED_UP, CCE_SPEED_UP = 0.85, 1.3, 1.2
GATHER_SHARE, PAIR_LOSS_SHARE = 0.9, 0.8
HEAD = f"linear_logprob, frozen head, N = {TARGET_ROWS}"
SHAPE_NAMES = {"llava-1.5-7b": "LLaVA-1.5", "qwen2.5-vl-7b": "Qwen2.5-VL"}
ATTENTION = "packed attention: >= 1.4x separate sequences"
PREDICTED_ATTENTION = "1.6x (visited blocks)"
# Computed estimates, not measurements. GEMMs: two in bpo against three in TRL's function and, on peaked logits, two in
# cut-cross-entropy, whose GEMMs are written in Triton. Bytes: kernels/README.md.
PREDICTED_ROOFLINE = "86-89 % (6-7 N V bytes)"
PREDICTED_TRL = "1.4x"
PREDICTED_CCE = "1.15-1.35x"
PREDICTED_GATHER = "85-95 %"
PREDICTED_PAIR_LOSS = "65-85 % (54.5 MB in 5 launches)"
PREDICTED_EAGER = "1.3x with a head at N = 2048"


def kernel_results(report: dict[str, Any]) -> list[Result]:
    """All lines of the kernel benchmarks; the first one if two parts measured the same case."""
    found: dict[tuple, Result] = {}
    for record in report["parts"].values():
        content = record["report"]
        lines = content.get("results", []) if isinstance(content, dict) else []
        for line in lines:
            if "operation" not in line:
                break  # the report of a different benchmark
            result = Result(**line)
            found.setdefault((*case_of(result).values(), result.provider), result)
    return list(found.values())


def case_of(result: Result) -> dict[str, str | int]:
    return {name: getattr(result, name) for name in ("operation", "variant", "shape", "num_rows", "logits")}


def timed(results: Iterable[Result], provider: str, **labels: str | int) -> list[Result]:
    """Lines of `provider` with times, for the cases with these labels."""
    return [
        result
        for result in results
        if result.provider == provider
        and result.status == "ok"
        and all(getattr(result, name) == value for name, value in labels.items())
    ]


def speed_ups(results: list[Result], other: str, **labels: str | int) -> list[float]:
    """Speedups of bpo over `other` for all cases in which both were timed."""
    pairs = ((ours, timed(results, other, **case_of(ours))) for ours in timed(results, "bpo", **labels))
    return [theirs[0].median_ms / ours.median_ms for ours, theirs in pairs if theirs]


def worst(target: str, predicted: str, values: list[float], least: float, form: str) -> Verdict:
    """The verdict on the smallest of `values`, which must be at least `least`."""
    if not values:
        return Verdict(target, NOT_MEASURED, None, predicted)
    measured = format(min(values), form) + ("x" if form.endswith("f") else "")
    return Verdict(target, measured, min(values) >= least, predicted)


def judge(report: dict[str, Any]) -> list[Verdict]:
    """Verdicts on all targets, in the order of the set."""
    on_gpu = report["device"] == "cuda" and not report["quick"]
    results = kernel_results(report) if on_gpu else []
    return [
        *_head_verdicts(results),
        *_bandwidth_verdicts(results),
        worst(
            "nothing slower than PyTorch eager at any measured shape",
            PREDICTED_EAGER,
            speed_ups(results, "eager"),
            1.0,
            ".2f",
        ),
        *_attention_verdicts(report if on_gpu else None),
        *_step_verdicts(report if on_gpu else None),
    ]


def _head_verdicts(results: list[Result]) -> list[Verdict]:
    verdicts = []
    for shape in TARGET_SHAPES:
        frozen = {"operation": "linear_logprob", "variant": "frozen", "shape": shape, "num_rows": TARGET_ROWS}
        where = f"{HEAD}, {SHAPE_NAMES[shape]}"
        shares = [line.gemm_share for line in timed(results, "bpo", **frozen) if line.gemm_share is not None]
        verdicts += [
            worst(f"{where}: >= 85 % of the GEMM roofline", PREDICTED_ROOFLINE, shares, ROOFLINE, ".1%"),
            worst(
                f"{where}: >= {TRL_SPEED_UP:g}x TRL's chunked log-prob",
                PREDICTED_TRL,
                speed_ups(results, "trl-chunked", **frozen),
                TRL_SPEED_UP,
                ".2f",
            ),
            worst(
                f"{where}: >= {CCE_SPEED_UP:g}x cut-cross-entropy on peaked logits",
                PREDICTED_CCE,
                speed_ups(results, "cce", **frozen, logits="peaked"),
                CCE_SPEED_UP,
                ".2f",
            ),
        ]
    return verdicts


def _bandwidth_verdicts(results: list[Result]) -> list[Verdict]:
    """Shares of copy bandwidth over the bytes that must move, at the largest number of rows."""

    def shares(operation: str, num_rows: int) -> list[float]:
        lines = timed(results, "bpo", operation=operation, num_rows=num_rows)
        return [line.copy_share for line in lines if line.copy_share is not None]

    gather = f"logprob_gather, N = {GATHER_ROWS}: >= 90 % of copy bandwidth over the bytes that must move"
    pairs = "preference_loss, N = 4 Mi: >= 80 % of copy bandwidth over the bytes that must move"
    return [
        worst(gather, PREDICTED_GATHER, shares("logprob_gather", GATHER_ROWS), GATHER_SHARE, ".1%"),
        worst(pairs, PREDICTED_PAIR_LOSS, shares("preference_loss", PAIR_LOSS_ROWS), PAIR_LOSS_SHARE, ".1%"),
    ]


def _attention_verdicts(report: dict[str, Any] | None) -> list[Verdict]:
    content = report["parts"].get("attention", {}).get("report") if report else None
    found = [Verdict(**target) for target in (content or {}).get("targets", [])]
    return found or [Verdict(ATTENTION, NOT_MEASURED, None, PREDICTED_ATTENTION)]


def _step_verdicts(report: dict[str, Any] | None) -> list[Verdict]:
    verdicts = []
    for part, completions in (("step", 2), ("step-3", 3)):
        content = report["parts"].get(part, {}).get("report") if report else None
        found = [Verdict(**target) for case in (content or {}).get("cases", []) for target in case["targets"]]
        nothing = gpu_verdicts({"completions": completions, "device": "cpu", "model": ""}, None)
        verdicts += [verdict for verdict in found if verdict.target.startswith("step")] or nothing
    return verdicts


def targets_table(verdicts: list[Verdict]) -> str:
    """Markdown table with the columns of kernels/README.md and a verdict."""
    words = {True: "yes", False: "**no**", None: NOT_MEASURED}
    lines = ["| target | predicted (est.) | measured (worst case) | met |", "|---|---|---|---|"]
    lines += [f"| {v.target} | {v.predicted} | {v.measured} | {words[v.met]} |" for v in verdicts]
    return "\n".join(lines)
