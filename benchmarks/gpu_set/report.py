"""Renders a report of the GPU set as a Markdown page, from its JSON only.

Sections follow kernels/README.md and docs/performance.md, so that tables can be copied there unchanged.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu_set.targets import case_of, judge, kernel_results, targets_table, timed
from bpo.tools.bench.lever_table import table as lever_table
from bpo.tools.bench.report import table as step_table
from bpo_kernels.bench.measure import Result

MIB = 2**20
PROVIDER_NAMES = {
    "bpo": "**bpo**",
    "bpo-fused": "bpo, `fused`",
    "eager": "PyTorch eager",
    "trl-chunked": "TRL's chunked log-prob",
    "cce": "cut-cross-entropy",
    "liger": "Liger, fused linear cross entropy",
    "liger-dpo": "Liger's fused DPO, with its prompts",
    "quack": "QuACK",
    "torch-chunked": "PyTorch's chunked linear_cross_entropy",
}


def render(report: dict[str, Any]) -> str:
    """Renders the whole page."""
    results = kernel_results(report)
    timing = "Device times with a cold L2 cache" if report["device"] == "cuda" else "CPU times"
    sections = [
        _head(report),
        f"## Targets\n\n{targets_table(judge(report))}",
        _kernels("LM head", results, "linear_logprob", timing),
        _kernels("LM head and preference loss", results, "linear_preference_loss", timing),
        _kernels("Log-probs from logits", results, "logprob_gather", timing),
        _kernels("Preference loss", results, "preference_loss", timing),
        _attention(report),
        _steps(report),
        _levers(report),
        _memory(report),
        _tests(report),
        _smoke(report),
        _not_run(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def content_of(report: dict[str, Any], part: str) -> Any:
    """The report of a part, or None."""
    return report["parts"].get(part, {}).get("report")


def _head(report: dict[str, Any]) -> str:
    about = dict(report["machine"])
    device, commit = about.pop("device"), about.pop("commit")
    rest = ", ".join(f"{key} {value}" for key, value in about.items() if value not in ("", "not installed"))
    absent = [key for key, value in about.items() if value == "not installed"]
    lines = [f"# {device}", "", f"{report['date']}, commit {commit}; {rest}."]
    lines += [f"Not installed: {', '.join(absent)}."] if absent else []
    if report["quick"] or report["device"] != "cuda":
        lines += ["", "**A dry run with tiny shapes: no figure below is a measurement.**"]
    seconds = sum(record["seconds"] for record in report["parts"].values())
    return "\n".join([*lines, "", f"`python benchmarks/gpu.py`: {len(report['parts'])} parts, {seconds:.0f} s."])


def _range(line: Any) -> str:
    return f"{line.median_ms:.3f} ({line.p20_ms:.3f}-{line.p80_ms:.3f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _kernels(title: str, results: list[Result], operation: str, timing: str) -> str:
    """All cases and providers of an operation; `bpo is faster` is the provider's time divided by bpo's."""
    lines = [result for result in results if result.operation == operation]
    if not lines:
        return ""
    has_head = operation.startswith("linear_")
    share = "of GEMM roofline" if has_head else "of copy bandwidth"
    head = ["shape", "variant", "N", "logits", "provider", "ms (p20-p80)", share, "peak MiB", "bpo is faster"]
    rows, skipped = [], {}
    for line in lines:
        provider = PROVIDER_NAMES.get(line.provider, line.provider)
        start = [line.shape, line.variant, f"{line.num_rows:,}", line.logits, provider]
        if line.status == "skipped":
            skipped[f"- {provider} was skipped: {line.note}"] = True
        elif line.status != "ok":
            rows.append([*start, f"{line.status}: {line.note}", "", "", ""])
        else:
            ours = timed(lines, "bpo", **case_of(line))
            faster = f"{line.median_ms / ours[0].median_ms:.2f}x" if ours and line.provider != "bpo" else ""
            figures = [_range(line), _percent(line.gemm_share if has_head else line.copy_share)]
            rows.append([*start, *figures, f"{line.peak_bytes / MIB:,.1f}", faster])
    note = f"{timing}; peak memory is above the inputs."
    return "\n".join([f"## {title}", "", note, "", table(head, rows), *([""] if skipped else []), *skipped])


def _attention(report: dict[str, Any]) -> str:
    content = content_of(report, "attention")
    if not content:
        return ""
    rows = []
    for line in content["results"]:
        start = [line["shape"], f"{line['tokens']:,}", str(line["groups"]), line["provider"]]
        if line["status"] != "ok":
            rows.append([*start, f"{line['status']}: {line['note']}", "", ""])
            continue
        alone = [
            other["median_ms"]
            for other in content["results"]
            if other["provider"] == "separate" and (other["shape"], other["tokens"]) == (line["shape"], line["tokens"])
        ]
        faster = f"{alone[0] / line['median_ms']:.2f}x" if alone and line["provider"] != "separate" else ""
        spread = f"{line['median_ms']:.3f} ({line['p20_ms']:.3f}-{line['p80_ms']:.3f})"
        rows.append([*start, spread, f"{line['peak_mib']:,.1f}", faster])
    head = ["shape", "tokens", "groups", "backend", "ms (p20-p80)", "peak MiB", "faster than separate sequences"]
    note = "One layer, forward and backward, of one packed row."
    return f"## Attention over packed groups\n\n{note}\n\n{table(head, rows)}"


def _steps(report: dict[str, Any]) -> str:
    blocks = []
    for part in ("step", "step-trl", "step-3"):
        for case in (content_of(report, part) or {}).get("cases", []):
            about = case["case"]
            lines = [f"{about['model']}, {about['completions']} completions per group, {about['num_groups']} groups, "]
            lines[0] += f"{about['dtype']}, gradient checkpointing {about['gradient_checkpointing']}:"
            lines += ["", step_table(case), ""]
            for name, first in case["first_step"].items():
                lines.append(
                    f"- first step of {name}: loss {first['loss']:.6f}, gradient norm {first['grad_norm']:.5f}"
                )
            pairs = about["num_pairs"] / about["num_groups"]
            for name, figures in case["figures"].items():
                speed = 1 / statistics.median(figures["seconds"])
                lines.append(f"- {name}: {speed:,.2f} pairs/s ({pairs:g} pairs per group)")
            blocks.append("\n".join([*lines, *(f"- {note}" for note in case.get("notes", []))]))
    return "\n\n".join(["## A training step against TRL's", *blocks]) if blocks else ""


def _levers(report: dict[str, Any]) -> str:
    contents = [content_of(report, part) for part in ("levers", "levers-qwen", "levers-7b")]
    blocks = [lever_table(content) for content in contents if content]
    note = (
        "Each row changes `plain`. MFU is of useful FLOPs; `-4l` has 4 of the model's 32 (LLaVA) or 28 (Qwen) layers."
    )
    return "\n\n".join(["## Options of a training step", note, *blocks]) if blocks else ""


def _memory(report: dict[str, Any]) -> str:
    content = content_of(report, "memory")
    if not content:
        return ""
    rows = []
    for outcome in content["outcomes"]:
        measured, predicted = outcome["measured"], outcome["predicted"]
        cells = [f"{measured[phase] / 1e6:.1f} / {predicted[phase] / 1e6:.1f}" for phase in measured]
        rows.append([outcome["case"]["name"], *cells, f"{outcome['error']:+.1%}"])
    head = ["case", "forward", "backward", "update", "error of the peak"]
    return f"## The memory model of bpo plan\n\nMB, measured / predicted.\n\n{table(head, rows)}"


def _tests(report: dict[str, Any]) -> str:
    rows, notes = [], []
    for part in ("operation-tests", "gpu-tests"):
        for file, found in (content_of(report, part) or {}).items():
            rows.append([file, *(str(found[outcome]) for outcome in ("passed", "failed", "skipped"))])
            notes += [f"- failed: {failure['name']}" for failure in found["failures"]]
            notes += [f"- {file} skipped: {reason}" for reason in found["reasons"]]
    if not rows:
        return ""
    return "\n".join(["## Tests", "", table(["file", "passed", "failed", "skipped"], rows), "", *notes]).rstrip()


def _smoke(report: dict[str, Any]) -> str:
    content = content_of(report, "smoke")
    if not content:
        return ""
    rows = [
        [line["operation"], line["name"], line["status"], f"{line['seconds']:.1f}", line["note"]]
        for line in content["lines"]
    ]
    note = content.get("note", f"Implementation: {content['implementation']}. Seconds include compilation.")
    return f"## Smoke launches\n\n{note}\n\n{table(['operation', 'launch', 'status', 's', 'note'], rows)}"


def not_run(report: dict[str, Any]) -> list[str]:
    """One line for every part that did not pass, and for every case of a part that was not reached."""
    lines = []
    for name, record in report["parts"].items():
        if record["status"] != "passed":
            lines.append(f"{name} ({record['title']}): {record['status']}: {record['reason']}")
        content = record["report"]
        if isinstance(content, dict) and isinstance(content.get("not_run"), list):
            lines += [f"{name}: {line}" for line in content["not_run"]]
    return lines


def _not_run(report: dict[str, Any]) -> str:
    lines = not_run(report)
    return "\n".join(["## Not run", "", *([f"- {line}" for line in lines] or ["Everything was run."])])
