"""benchmarks/attention.py: its verdict, a backend that fails, the time limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import GROUPS, Line, main, row_of, verdict
from bpo.model.attention import choice as attention_choice

CUDA = torch.device("cuda")


def lines(**times_ms: float) -> list[Line]:
    return [Line("qwen2.5-vl-7b", 8, 7430, name, "ok", median_ms=median) for name, median in times_ms.items()]


@pytest.mark.parametrize(
    ("device", "tokens", "times_ms", "measured", "met"),
    [
        ("cuda", 8192, {"separate": 3.0, "varlen": 2.0, "flex": 1.0}, "1.50x", True),
        ("cuda", 8192, {"separate": 3.0, "varlen": 2.2, "flex": 1.0}, "1.36x", False),
        ("cuda", 8192, {"separate": 3.0, "flex": 1.0}, "not measured", None),
        ("cuda", 4096, {"separate": 3.0, "varlen": 2.0}, "not measured", None),
        ("cpu", 8192, {"separate": 3.0, "sdpa": 2.0}, "not measured", None),
    ],
)
def test_the_verdict_is_on_what_auto_takes(
    device: str, tokens: int, times_ms: dict, measured: str, met: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which `auto` takes varlen; another backend's time, another length or a CPU decide nothing."""
    for name, why_not in (("flash3", "absent"), ("flash", "absent"), ("varlen", None)):
        monkeypatch.setitem(attention_choice._OBSTACLES, name, lambda needs, why_not=why_not: why_not)
    layout = row_of(tokens, GROUPS)
    entry = verdict("qwen2.5-vl-7b", tokens, layout, lines(**times_ms), torch.device(device), torch.bfloat16)
    assert set(entry) == {"target", "predicted", "measured", "met"}
    backend = "varlen" if device == "cuda" else "sdpa"
    assert entry["target"] == (
        f"packed attention: >= 1.4x separate sequences (qwen2.5-vl-7b, {tokens:,} tokens, {backend})"
    )
    assert (entry["measured"], entry["met"]) == (measured, met)
    if (device, tokens) == ("cuda", 8192):
        assert entry["predicted"] == "1.62x (visited blocks)"  # 490 blocks against 302


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def by_provider(report: Path) -> dict[str, dict[str, Any]]:
    return {line["provider"]: line for line in json.loads(report.read_text())["results"]}


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_backend_with_a_fault_is_a_line_and_the_others_are_timed(
    fault: str, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa = attention.BACKENDS["sdpa"]

    def broken(*arguments: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return 2 * sdpa.attend(*arguments)

    monkeypatch.setitem(attention.BACKENDS, "flash", sdpa._replace(attend=broken))
    monkeypatch.setitem(attention_choice._OBSTACLES, "flash", lambda needs: None)
    assert main(["--device", "cpu", "--quick", "--json", str(report)]) == 1
    found = by_provider(report)
    status, note = {"raises": ("failed", "RuntimeError: no kernel image"), "is wrong": ("disagrees", "relative")}[fault]
    assert found["flash"]["status"] == status and note in found["flash"]["note"]
    assert found["sdpa"]["median_ms"] > 0 and found["separate"]["median_ms"] > 0


def test_without_time_the_report_says_so(report: Path) -> None:
    assert main(["--device", "cpu", "--quick", "--seconds", "0", "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    assert content["not_run"] == ["attention tiny T=512: no time was left"] and content["results"] == []
    assert [target["met"] for target in content["targets"]] == [None]
