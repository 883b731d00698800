"""Targets and page of the GPU set from a report. Every number here is made up for these tests; none was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_set.report import not_run, render
from benchmarks.gpu_set.targets import NOT_MEASURED, judge, kernel_results, targets_table
from bpo.tools.bench.report import Figures, Verdict
from bpo_kernels.bench.measure import Result

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"operation": "linear_logprob", "variant": "frozen", "shape": "llava-1.5-7b", "num_rows": 2048}
GATHER = {"operation": "logprob_gather", "variant": "gradient", "shape": "llava-1.5-7b", "num_rows": 8192}
PAIRS = {"operation": "preference_loss", "variant": "gradient", "shape": "", "num_rows": 4 << 20, "logits": "random"}


def line(provider: str, median_ms: float, **labels: Any) -> dict[str, Any]:
    given = {"logits": "peaked", "status": "ok", "p20_ms": 0.9 * median_ms, "p80_ms": 1.1 * median_ms}
    given |= {"peak_bytes": 3 << 20}
    return asdict(Result(**HEAD | given | labels, provider=provider, median_ms=median_ms))


def record(status: str = "passed", report: Any = None, **fields: Any) -> dict[str, Any]:
    return {"title": "its title", "status": status, "seconds": 7.0, "reason": "", "report": report} | fields


def made_up(results: list[dict[str, Any]] | None = None, **parts: Any) -> dict[str, Any]:
    """A report of a GPU that does not exist."""
    machine = {"device": "NVIDIA Fantasy 9", "commit": "c0ffee", "torch": "9.9", "quack-kernels": "not installed"}
    report = {"format": 2, "date": "2001-02-03", "device": "cuda", "quick": False, "machine": machine}
    found = {"head": record(report={"results": results, "not_run": []})} if results is not None else {}
    return report | {"parts": found | {name.replace("_", "-"): part for name, part in parts.items()}}


def verdict_of(report: dict[str, Any], *words: str) -> Verdict:
    (verdict,) = (found for found in judge(report) if all(word in found.target for word in words))
    return verdict


def test_nothing_is_filled_in_where_nothing_was_measured() -> None:
    verdicts = judge(made_up())
    assert {(verdict.measured, verdict.met) for verdict in verdicts} == {(NOT_MEASURED, None)}
    assert len(verdicts) == 2 * 3 + 2 + 1 + 1 + 4
    # Nor by a rehearsal, whatever its figures are.
    for rehearsal in ({"device": "cpu"}, {"quick": True}):
        results = [line("bpo", 1.0, gemm_share=0.99), line("eager", 9.0)]
        assert {verdict.met for verdict in judge(made_up(results) | rehearsal)} == {None}


@pytest.mark.parametrize(
    ("words", "other", "labels", "met"),
    [
        ((">= 1.3x TRL", "LLaVA"), ("trl-chunked", 1.31), {}, True),
        ((">= 1.3x TRL", "LLaVA"), ("trl-chunked", 1.29), {}, False),
        ((">= 1.3x TRL", "Qwen"), ("trl-chunked", 1.31), {"shape": "qwen2.5-vl-7b"}, True),
        ((">= 1.2x cut", "LLaVA"), ("cce", 1.21), {}, True),
        ((">= 1.2x cut", "LLaVA"), ("cce", 1.19), {}, False),
        ((">= 1.2x cut", "LLaVA"), ("cce", 9.0), {"logits": "random"}, None),  # of peaked logits alone
        (("nothing slower",), ("eager", 1.01), {"operation": "preference_loss", "num_rows": 128}, True),
        (("nothing slower",), ("eager", 0.99), {"operation": "preference_loss", "num_rows": 128}, False),
    ],
)
def test_speeds_are_judged(words: tuple[str, ...], other: tuple[str, float], labels: dict, met: bool | None) -> None:
    report = made_up([line("bpo", 1.0, **labels), line(*other, **labels)])
    assert verdict_of(report, *words).met is met


def test_shares_are_judged_on_the_worst_case_and_on_the_rows_of_the_target() -> None:
    good, bad = line("bpo", 1.0, gemm_share=0.9), line("bpo", 1.0, gemm_share=0.8, logits="random")
    assert verdict_of(made_up([good]), "roofline", "LLaVA").met is True
    found = verdict_of(made_up([good, bad]), "roofline", "LLaVA")
    assert (found.met, found.measured) == (False, "80.0%") and found.predicted
    few = line("bpo", 1.0, **GATHER | {"num_rows": 128}, copy_share=0.1)
    assert verdict_of(made_up([few, line("bpo", 1.0, **GATHER, copy_share=0.91)]), "logprob_gather").met is True
    assert verdict_of(made_up([few]), "logprob_gather").met is None
    for share, met in ((0.81, True), (0.79, False)):
        assert verdict_of(made_up([line("bpo", 1.0, **PAIRS, copy_share=share)]), "preference_loss").met is met


def test_another_case_mode_or_status_says_nothing() -> None:
    others = [line("bpo-store", 1.0), line("cce", 9.0), line("bpo", 1.0, num_rows=128)]
    assert verdict_of(made_up(others), "cut-cross", "LLaVA").met is None
    disagrees = [line("bpo", 1.0), line("trl-chunked", 2.0, status="disagrees")]
    assert verdict_of(made_up(disagrees), "TRL's chunked", "LLaVA").met is None


def test_a_case_that_two_parts_measured_counts_once() -> None:
    again = record(report={"results": [line("bpo", 5.0), line("cce", 6.0)], "not_run": []})
    report = made_up([line("bpo", 1.0)], head_rows=again)
    assert [(result.provider, result.median_ms) for result in kernel_results(report)] == [("bpo", 1.0), ("cce", 6.0)]


def step_report(completions: int = 2) -> dict[str, Any]:
    figures = {"bpo": (1e12, 820.0, 1.0, 1 << 30, (0.5, 0.4)), "bpo-reference": (5e11, 820.0, 1.0, 1 << 29, (0.2, 0.2))}
    figures["trl-liger"] = (2e12, 2880.0, 4.0, 3 << 30, (1.0, 1.2))
    ratios = {name: 0.5 for name in ("flops", "tokens", "images", "peak_bytes")}
    ratios |= {f"{name}_amortised": 0.6 for name in ("flops", "tokens", "images")}
    seconds = {"median": 0.4, "least": 0.3, "largest": 0.5}
    ratios |= {"anchor": "trl-liger", "seconds": seconds, "seconds_amortised": seconds}
    about = {"model": "llava-1.5-7b", "completions": completions, "num_groups": 4, "num_pairs": 4, "dtype": "bfloat16"}
    about |= {"gradient_checkpointing": "full", "device": "cuda", "epochs": 2}
    target = Verdict(f"step, {completions} completions: made up", "2.50x", True, "2.2x")
    flops = Verdict(f"{completions} completions: FLOPs", "0.4", True)
    case = {"case": about, "figures": {name: asdict(Figures(*words)) for name, words in figures.items()}}
    case |= {
        "first_step": {"bpo": {"loss": 0.5, "grad_norm": 2.0}},
        "refused": {},
        "ratios": ratios,
        "notes": ["a note"],
    }
    return {"cases": [case | {"targets": [asdict(flops), asdict(target)]}]}


def whole() -> dict[str, Any]:
    """A made-up report with something in every section."""
    skipped = asdict(Result(**HEAD, logits="peaked", provider="quack", status="skipped", note="quack is missing"))
    results = [line("bpo", 2.0, gemm_share=0.87), line("trl-chunked", 3.0), skipped]
    attention = {
        "results": [
            {"shape": "llava-1.5-7b", "groups": 8, "tokens": 7430, "provider": name, "status": status, "note": note}
            | {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "peak_mib": 5.0}
            for name, status, note, ms in (
                ("separate", "ok", "", 3.0),
                ("flex", "ok", "", 2.0),
                ("flash", "skipped", "flash-attn is missing", None),
            )
        ],
        "targets": [asdict(Verdict("packed attention: made up", "1.50x", True, "1.6x"))],
        "not_run": [],
    }
    outcome = {"case": {"name": "llava-lora"}, "measured": {"forward": 1e6, "backward": 2e6, "step": 3e6}}
    outcome |= {"predicted": {"forward": 1e6, "backward": 2.1e6, "step": 3e6}, "error": 0.05}
    about = {"model": "llava-1.5-7b-4l", "device": "cuda", "num_tokens": 8192}
    row = {"name": "all", "changes": {"lora.kernel": "fused"}, "status": "not here", "reason": "a reason"}
    tests = {"passed": 5, "failed": 1, "skipped": 2, "failures": [{"name": "a.py::test_b", "message": "no"}]}
    smoke = {"operation": "preference_loss", "name": "hinge", "status": "failed", "seconds": 1.5, "note": "too large"}
    report = made_up(
        results,
        smoke=record("failed", {"implementation": "triton", "lines": [smoke]}),
        operation_tests=record("failed", {"tests/kernels/a.py": tests | {"seconds": 1.0, "reasons": ["a reason"]}}),
        attention=record(report=attention),
        step=record(report=step_report()),
        levers=record(report={"case": about, "rows": [row]}),
        memory=record(report={"outcomes": [outcome]}),
        gather=record("not run", reason="3 tests of logprob_gather fail"),
        quack=record("skipped", reason="quack is not installed"),
    )
    report["parts"]["head"]["report"]["not_run"] = ["linear_logprob frozen N=2048: not reached"]
    return report


def test_the_page_is_a_function_of_the_json_alone() -> None:
    assert render(json.loads(json.dumps(whole()))) == render(whole())


def test_the_page_says_where_the_figures_come_from_and_shows_each_section() -> None:
    page = render(whole())
    for text in (
        "# NVIDIA Fantasy 9\n\n2001-02-03, commit c0ffee; torch 9.9.\nNot installed: quack-kernels.",
        "| packed attention: made up | 1.6x | 1.50x | yes |",
        "| step, 2 completions: made up | 2.2x | 2.50x | yes |",
        "| llava-1.5-7b | frozen | 2,048 | peaked | **bpo** | 2.000 (1.800-2.200) | 87% | 3.0 |  |",
        "| llava-1.5-7b | frozen | 2,048 | peaked | TRL's chunked log-prob | 3.000 (2.700-3.300) |  | 3.0 | 1.50x |",
        "- QuACK was skipped: quack is missing",
        "| llava-1.5-7b | 7,430 | 8 | flex | 2.000 (2.000-2.000) | 5.0 | 1.50x |",
        "| flash | skipped: flash-attn is missing |",
        "| TRL, Liger | 2,000.00 |",
        "**bpo / TRL, Liger**",
        "peak MiB above the weights",
        "- trl-liger: 0.91 pairs/s (1 pairs per group)",
        "- a note",
        "model llava-1.5-7b-4l, device cuda, num_tokens 8192",
        "| all: lora.kernel=fused | not here: a reason |",
        "| llava-lora | 1.0 / 1.0 | 2.0 / 2.1 | 3.0 / 3.0 | +5.0% |",
        "| tests/kernels/a.py | 5 | 1 | 2 |",
        "- failed: a.py::test_b",
        "| preference_loss | hinge | failed | 1.5 | too large |",
        "- gather (its title): not run: 3 tests of logprob_gather fail",
        "- quack (its title): skipped: quack is not installed",
        "- head: linear_logprob frozen N=2048: not reached",
    ):
        assert text in page, text
    assert "dry run" not in page
    assert "**A dry run" in render(whole() | {"quick": True})


def test_a_report_without_any_part_is_a_page_too() -> None:
    page = render(made_up())
    assert "Everything was run." in page and not_run(made_up()) == []
    assert [text for text in page.splitlines() if text.startswith("## ")] == ["## Targets", "## Not run"]


def test_the_targets_stand_in_the_documents_as_they_are_judged() -> None:
    """kernels/README.md has those of the kernels, docs/performance.md those of the step; figures come from reports."""
    documents = {name: (ROOT / name).read_text() for name in ("kernels/README.md", "docs/performance.md")}
    for verdict in judge(made_up()):
        name = "docs/performance.md" if verdict.target.startswith(("step", "packed")) else "kernels/README.md"
        assert f"| {verdict.target} | {verdict.predicted} |" in documents[name], verdict.target
    assert targets_table(judge(made_up())).count(NOT_MEASURED) == 2 * len(judge(made_up()))
