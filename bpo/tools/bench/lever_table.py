"""The table of `bpo bench step --levers` as Markdown, line by line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

_UNCOUNTED = "not counted"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _columns(about: dict[str, Any]) -> list[str]:
    on_gpu = about["device"] == "cuda"
    columns = ["", "time / plain (range)", "ms", "GFLOP", "GB moved", "launches"]
    columns += ["peak MiB with weights" if on_gpu else "peak MiB / step", "warm-up s", "nats / token from plain"]
    return columns + (["ms in kernels", "tokens / s", "useful TFLOP/s", "MFU"] if on_gpu else [])


def head(about: dict[str, Any]) -> str:
    """The case and the head of the table."""
    columns = _columns(about)
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
    return f"{facts}\n\n{_row(columns)}\n{_row(['---'] * len(columns))}"


def line(result: dict[str, Any], about: dict[str, Any]) -> str:
    """One row; a row without figures says why. A wrong one shows all its differences from `plain`."""
    columns = _columns(about)
    name = result["name"]
    if name.startswith("all"):
        name += f": {', '.join('='.join(change) for change in result['changes'].items())}"
    if "ratio" not in result or result["status"] == "failed":
        cells = [name, f"{result['status']}: {result['reason']}".replace("|", "/")]
        return _row(cells + [""] * (len(columns) - len(cells)))
    ratio, seconds = result["ratio"], statistics.median(result["seconds"])
    gaps = result["distances"]
    apart = f"{gaps['logp']:.2g}"
    if result["status"] == "WRONG":
        apart = f"**WRONG**: log-probs {apart}, loss {gaps['loss']:.2g}, gradient norm {gaps['grad_norm']:.2%}"
    cells = [
        name,
        f"{ratio['median']:.3f} ({ratio['least']:.3f}-{ratio['largest']:.3f})",
        f"{seconds * 1e3:,.1f}",
        f"{result['flops'] / 1e9:,.1f}" if "flops" in result else _UNCOUNTED,
        f"{result['bytes'] / 1e9:,.2f}" if "bytes" in result else _UNCOUNTED,
        f"{result['launches']:,}" if "launches" in result else _UNCOUNTED,
        f"{result['peak_bytes'] / 2**20:,.1f}",
        f"{result['warm_up_seconds']:.1f}",
        apart,
    ]
    if about["device"] == "cuda":
        rate, peak = result["useful_flops"] / seconds / 1e12, result.get("peak_tflops")
        mfu = "" if peak is None else f"{rate / peak:.1%}"
        cells += ["" if "kernel_seconds" not in result else f"{result['kernel_seconds'] * 1e3:,.1f}"]
        cells += [f"{about['num_tokens'] / seconds:,.0f}", f"{rate:,.1f}", mfu]
    return _row(cells)


def table(report: dict[str, Any]) -> str:
    """The whole table of a report."""
    about = report["case"]
    return "\n".join([head(about), *(line(result, about) for result in report["rows"])])
