"""`bpo bench step --levers`: its rows, what a wrong, refused or failing row does, and one run of the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import Dropped, load_encoder
from bpo.data.groups import GroupDataset
from bpo.formats.files import read_groups
from bpo.model.levers import patch_embedding
from bpo.model.levers.choice import Lever
from bpo.tools.bench import lever_table, levers
from bpo.tools.bench.levers import EXACT, PLAIN, Row, all_rows, combined, configured, distances, selected_rows
from bpo.tools.bench.step import main
from bpo.tools.bench.synthetic import SHAPES, Lengths, write_groups, write_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ["--model", "llava-1.5-7b-32nd", "--image-tokens", "4", "--prompt-tokens", "24", "--answer-tokens", "8"]
SMALL += ["--levers", "--num-groups", "4", "--repetitions", "1", "--completions", "2"]


def test_every_option_has_a_row_and_unknown_rows_are_refused() -> None:
    rows = {row.name: row for row in all_rows(CUDA, "full")}
    options = {name for row in rows.values() for name in row.changes}
    assert options == {*PLAIN, "model.gradient_checkpointing", "model.attention"}
    assert {"all", "all, recomputing none", "auto", "model.attention=flex", "model.quantization=nf4"} <= set(rows)
    assert "model.attention=flex" not in {row.name for row in all_rows(CPU, "none")}
    for row in rows.values():
        configured(Config(), PLAIN | row.changes, row.name)
    assert [row.name for row in selected_rows(["auto", "all", "plain"], list(rows.values()))] == ["all", "auto"]
    with pytest.raises(ValueError, match="--rows fast: no such row; the rows are model.patch_embedding=gemm"):
        selected_rows(["fast", "all"], list(rows.values()))


def test_all_combines_the_rows_that_are_right_and_the_faster_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(option: tuple[str, str], status: str = "ok", ratio: float = 1.0) -> dict[str, Any]:
        return {"name": "=".join(option), "status": status, "ratio": {"median": ratio}}

    patch, liger, addmm, fused, encode, layers = EXACT
    results = [result(patch), result(liger, "WRONG"), result(addmm, ratio=0.8), result(fused, ratio=0.9)]
    results += [result(encode, "failed")]
    assert combined(Config(), CPU, results) == dict([patch, addmm])
    # Without measurements: what can be used here.
    monkeypatch.setattr(levers, "refusal", lambda config, device, row: "no" if "liger" in row.changes.values() else "")
    assert combined(Config(), CPU, []) == dict([patch, fused, encode, layers])


def test_differences_are_per_token_and_nan_is_one() -> None:
    pair = {"chosen": -100.0, "rejected": -110.0, "reference_chosen": -101.0, "reference_rejected": -109.0}
    plain = {"pairs": {"0": pair}, "loss": 0.6, "grad_norm": 2.0}
    tokens = {"0": (10, 20)}
    other = plain | {"pairs": {"0": pair | {"rejected": -110.5}}, "grad_norm": 2.2}
    assert distances(plain, other, tokens) == pytest.approx({"logp": 0.025, "loss": 0.0, "grad_norm": 0.1})
    broken = plain | {"pairs": {"0": pair | {"rejected": math.nan}}}
    assert math.isnan(distances(plain, broken, tokens)["logp"])


def test_a_shape_of_qwen_has_the_lengths_that_were_asked_for(tmp_path: Path) -> None:
    lengths, shape = Lengths(16, 24, 8, 2), "qwen2.5-vl-7b-28th"
    model = write_model(tmp_path / "model", shape, lengths.image_tokens, torch.float32, CPU)
    path = write_groups(tmp_path, lengths, 3, 2, SHAPES[shape].pixels_per_token)
    groups = read_groups(path)
    assert len(groups) == 3 and len({image for group in groups for image in group.images}) == 2
    encoder = load_encoder(Config(model=ModelConfig(path=str(model)), data=DataConfig(image_root=str(tmp_path))))
    encoded = GroupDataset(groups, encoder, max_words=100, types=()).encode(0)
    assert not isinstance(encoded, Dropped)
    assert encoded.num_tokens == 16 + 24 + 2 * 8
    full = SHAPES["qwen2.5-vl-7b"], SHAPES["llava-1.5-7b"]
    assert [(shape.layers, shape.vision_layers) for shape in full] == [(28, 32), (32, 24)]


def test_rows_are_printed_and_written_as_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One right row, a wrong one, one that is refused, and one that fails; the others are not affected."""
    right_choose, right_install = patch_embedding.choose, patch_embedding.install

    def choose(config: Config, resolved: Any) -> Lever:
        if config.lora.kernel == "fused":
            raise ValueError("lora.kernel fused needs a\nGPU")
        return right_choose(config, resolved)

    def install(model: Any, family: Any, config: Config, lever: Lever) -> str:
        if lever.value == "gemm":
            with torch.no_grad():
                model.lm_head.weight.mul_(1.5)
        if config.lora.kernel == "addmm":
            raise RuntimeError("out of memory")
        return right_install(model, family, config, lever)

    monkeypatch.setattr(patch_embedding, "choose", choose)
    monkeypatch.setattr(patch_embedding, "install", install)
    path = tmp_path / "report.json"
    rows = ["model.patch_embedding=gemm", "lora.kernel=addmm", "lora.kernel=fused", "vision.encode=step", "all"]
    assert main([*SMALL, "--json", str(path), "--rows", *rows]) == 1
    report = json.loads(path.read_text())
    found = {row["name"]: row for row in report["rows"]}
    assert [row["status"] for row in report["rows"]] == ["ok", "WRONG", "failed", "not here", "ok", "ok"]
    assert found["lora.kernel=addmm"]["reason"] == "RuntimeError: out of memory"
    assert found["lora.kernel=fused"]["reason"] == "lora.kernel fused needs a GPU"
    assert found["all"]["changes"] == {"vision.encode": "step"}
    plain, step = found["plain"], found["vision.encode=step"]
    assert abs(plain["loss"] - math.log(2)) > 1e-4 and step["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    for row in (plain, step):
        assert row["bytes"] > 1e6 and row["launches"] > 100 and row["peak_bytes"] > 0 and len(row["seconds"]) == 1
    assert report["case"]["num_images"] == 3 and report["case"]["micro_batches"] == 2
    assert report["case"]["num_tokens"] == 4 * (4 + 24 + 2 * 8)
    printed = capfd.readouterr().out
    assert lever_table.table(report) in printed and "it/s" not in printed
    assert "| **WRONG**: log-probs " in printed and "| failed: RuntimeError: out of memory |" in printed


def test_after_the_time_no_row_is_begun_and_without_plain_there_is_no_table(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(row: Row) -> dict[str, Any]:
        measured.append(row.name)
        return {"name": row.name, "changes": row.changes, "status": "ok", "reason": "out of memory"}

    bench: Any = SimpleNamespace(measure=measure)
    rows = [Row("auto", {}), Row("more", {})]
    found = list(levers.measure_rows(bench, rows, 0.0, tmp_path / "log"))
    assert [row["status"] for row in found] == ["ok", "not run", "not run"] and measured == ["plain"]
    bench.measure = lambda row: measure(row) | {"status": "failed"}
    with pytest.raises(RuntimeError, match="the plain step failed: out of memory"):
        list(levers.measure_rows(bench, rows, 9.0, tmp_path / "log"))


def test_a_gpu_has_rates_and_the_share_of_its_peak() -> None:
    about = {"device": "cuda", "num_tokens": 8192}
    result = {"name": "auto", "changes": {}, "status": "ok", "seconds": [0.5], "useful_flops": 2e14}
    result |= {"ratio": {"median": 0.8, "least": 0.7, "largest": 0.9}, "peak_tflops": 1000.0, "peak_bytes": 2**20}
    result |= {
        "distances": {"logp": 0.0, "loss": 0.0, "grad_norm": 0.0},
        "warm_up_seconds": 3.0,
        "launches": 1200,
        "kernel_seconds": 0.25,
    }
    line = lever_table.line(result, about)
    assert line.endswith("| 1,200 | 1.0 | 3.0 | 0 | 250.0 | 16,384 | 400.0 | 40.0% |")
    assert line.count("not counted") == 2
    assert line.count("|") == lever_table.head(about).splitlines()[-1].count("|")
