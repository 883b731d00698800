"""The `bpo plan` command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpo.config.io import load_config
from bpo.tools.plan import candidates
from bpo.tools.plan.activations import ActivationCosts, activation_costs
from bpo.tools.plan.command import main, parse_bytes
from bpo.tools.plan.shape import ModelShape


@pytest.fixture(scope="module", autouse=True)
def each_model_is_traced_once() -> Iterator[None]:
    traced: dict[tuple[Any, ...], ActivationCosts] = {}

    def costs(shape: ModelShape, mode: str, *, gathers: bool) -> ActivationCosts:
        key = shape.name, shape.num_trained, mode, gathers
        if key not in traced:
            traced[key] = activation_costs(shape, mode, gathers=gathers)
        return traced[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(candidates, "activation_costs", costs)
        yield


def plan(tmp_path: Path, *options: str, status: int = 0) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    assert main([*options, "--json", str(path)]) == status
    return json.loads(path.read_text())


def best(report: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in report["rows"] if row["recommended"])


def test_the_recommendation_is_the_fastest_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(tmp_path, "--model", "llava-1.5-7b", "--nodes", "2", "--gpu-memory", "20GB", "--groups-count", "9000")
    fitting = [row for row in report["rows"] if row["fits_gpu"] and row["fits_host"]]
    assert best(report)["step_seconds"]["total"] == min(row["step_seconds"]["total"] for row in fitting)
    assert all(row["gb"]["peak"] <= 20 for row in fitting)
    # Whole weights leave room for a group only where layers are computed again; divided ones do less.
    chosen = {row["ds_config"]: row["gradient_checkpointing"] for row in fitting}
    assert (chosen["zero1"], chosen["zero3"]) == ("full", "selective")
    text = capsys.readouterr().out
    assert "computed, not measured" in text and "9,000 groups: " in text
    options = re.findall(r"--(?:train|model)\.\w+ \S+", text)
    argv = [word for option in options for word in option.split()]
    config = load_config(argv, "bpo train", "")  # what it prints can be given as it stands
    assert config.train.max_micro_batch_tokens == best(report)["micro_batch_tokens"]
    assert config.train.ds_config == f"ds_configs/{best(report)['ds_config']}.json"
    assert config.train.reference_micro_batch_tokens >= config.train.max_micro_batch_tokens


def test_from_one_gpu_to_1024(tmp_path: Path) -> None:
    """More GPUs: states of ZeRO-3 shrink, an epoch is never slower, nothing breaks at either end."""
    peaks, pairs = [], []
    for nodes, gpus in ((1, 1), (1, 8), (128, 8)):
        options = ("--model", "qwen2-vl-2b", "--language", "full", "--groups-per-step", "1024")
        report = plan(tmp_path, *options, "--nodes", str(nodes), "--gpus-per-node", str(gpus))
        zero3 = next(row for row in report["rows"] if row["ds_config"] == "zero3")
        peaks.append(zero3["gb"]["optimizer"] + zero3["gb"]["weights"])
        pairs.append(best(report)["pairs_per_hour"])
    assert peaks == sorted(peaks, reverse=True)
    assert pairs == sorted(pairs)


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_gpu = ("--model", "qwen2-vl-2b", "--gpus-per-node", "1", "--language", "full")
    report = plan(tmp_path, *one_gpu, "--gpu-memory", "3GB", status=1)
    assert not any(row["fits_gpu"] or row["recommended"] for row in report["rows"])
    text = capsys.readouterr().out
    assert "does not fit the GPU" in text and "nothing fits" in text
    small = plan(tmp_path, *one_gpu, "--gpu-memory", "16GB", "--host-memory", "20GB", status=1)
    assert {row["fits_host"] for row in small["rows"] if row["ds_config"] == "zero3_offload"} == {False}
    assert "does not fit the host" in capsys.readouterr().out
    assert "offload" in best(plan(tmp_path, *one_gpu, "--gpu-memory", "16GB"))["ds_config"]


def test_groups_and_configuration_are_read(tmp_path: Path, tiny_llava_dir: Path) -> None:
    record = {"images": ["a.png"], "prompt": "What is it?", "completions": []}
    answers = [{"response": "word " * 20, "score": score, "type": "gt"} for score in (1, 0, 0)]
    lines = [json.dumps({**record, "id": str(k), "completions": answers}) for k in range(5)]
    (tmp_path / "groups.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run.yaml").write_text(f"model: {{path: '{tiny_llava_dir}'}}\ntrain: {{groups_per_step: 3}}\n")
    report = plan(
        tmp_path, "--config", str(tmp_path / "run.yaml"), "--groups", str(tmp_path / "groups.jsonl"),
        "--gpus-per-node", "1",
    )  # fmt: skip
    assert report["groups_of_an_epoch"] == 5 and report["groups_per_step"] == 3
    group = report["group"]
    assert (group["completions"], group["pairs"], group["response_tokens"], group["image_tokens"]) == (3, 2, 28, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--model is missing"),
        (("--model", "llava-1.5-7b", "--nodes", "0"), "--nodes is 0"),
        (("--model", "llava-1.5-7b", "--mfu", "1.5"), "--mfu is 1.5"),
        (("--model", "llava-1.5-7b", "--completions", "1"), "--completions is 1"),
        (("--model", "llava-1.5-7b", "--gpu", "h1000"), "--gpu h1000: unknown"),
        (("--model", "llava-1.5-7b", "--gpu-memory", "lots"), "'lots' is not a memory size"),
    ],
)
def test_mistakes_are_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        main(list(options))


def test_sizes_of_memory() -> None:
    assert parse_bytes("80GB") == parse_bytes("80") == 80e9
    assert parse_bytes("80 GiB") == 80 * 2**30
    assert parse_bytes("1.5tb") == 1.5e12
