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
    answers = [{"response": f"{k} " + "word " * 19, "score": int(not k), "type": "gt"} for k in range(3)]
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


METHODS = Path(__file__).resolve().parents[3] / "bpo" / "recipes" / "methods"


def of_640_and_twice_150(tmp_path: Path, model: Path, method: str, *options: str, status: int = 0) -> dict[str, Any]:
    """The recipe for groups of an image and prompt of 640 tokens and two answers of 150, on one GPU."""
    sizes = ("--image-tokens", "576", "--prompt-tokens", "64", "--response-tokens", "150", "--completions", "2")
    recipe = ("--config", str(METHODS / f"{method}.yaml"), "--model", str(model), "--gpus-per-node", "1")
    return plan(tmp_path, *recipe, *sizes, *options, status=status)


def test_a_loss_is_sized_by_the_views_that_it_packs(
    tmp_path: Path, tiny_llava_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = of_640_and_twice_150(tmp_path, tiny_llava_dir, "mdpo", "--language", "full")
    assert (report["packed_tokens"], report["separate_tokens"]) == (1730, 2370)
    text = capsys.readouterr().out
    assert "1,730 tokens per group in one forward pass, 2,370 as separate sequences (1.37 times)" in text
    assert "clean images: 940 = 640 (1 image) + 2 x 150\n  view crop (crop): 790 = 640 (1 image) + 1 x 150" in text
    alone = of_640_and_twice_150(tmp_path, tiny_llava_dir, "dpo", "--language", "full")
    assert (alone["packed_tokens"], alone["separate_tokens"]) == (940, 1580)
    assert "view" not in capsys.readouterr().out
    # Computation of a step grows by about as much as its tokens.
    seconds = [best(r)["step_seconds"]["useful"] for r in (report, alone)]
    assert seconds[0] / seconds[1] == pytest.approx(1730 / 940, rel=0.1)


def test_a_loss_without_a_reference_has_no_reference_pass(
    tmp_path: Path, tiny_llava_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = of_640_and_twice_150(tmp_path, tiny_llava_dir, "orpo", "--groups-count", "500")
    assert report["reference_micro_batch_tokens"] == 0 and report["group"]["reference"] is None
    text = capsys.readouterr().out
    assert "no reference pass: no term has a reference" in text
    assert "reference_micro_batch_tokens" not in text and "for the reference pass" not in text
    of_640_and_twice_150(tmp_path, tiny_llava_dir, "dpo", "--groups-count", "500")
    assert "h for the reference pass" in capsys.readouterr().out


def test_terms_across_groups_keep_the_activations_of_a_step(
    tmp_path: Path, tiny_llava_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Smaller micro-batches do not make a step of twice as many groups fit."""

    def kept_gb(method: str, groups: int, status: int = 0) -> float:
        options = ("--groups-per-step", str(groups), "--gpu-memory", "2.5GB", "--language", "full")
        report = of_640_and_twice_150(tmp_path, tiny_llava_dir, method, *options, status=status)
        assert report["keeps_activations_of_whole_step"] == (method == "rpo")
        row = next(row for row in report["rows"] if row["ds_config"] == "zero2")
        return row["gb"]["activations"] + row["gb"]["head"]

    alone = kept_gb("dpo", 400)
    assert kept_gb("dpo", 800) == alone
    assert "wait" not in capsys.readouterr().out
    coupled = kept_gb("rpo", 400)
    assert coupled > alone
    assert "all micro-batches of a step wait for its first backward pass" in capsys.readouterr().out
    assert kept_gb("rpo", 800, status=1) > 1.5 * coupled
    text = capsys.readouterr().out
    assert "does not fit the GPU, with all activations of a step" in text
    assert "nothing fits: lower train.groups_per_step" in text


def test_options_replace_what_a_file_of_groups_says(tmp_path: Path, tiny_llava_dir: Path) -> None:
    answers = [{"response": f"{k} word", "score": int(not k), "type": "gt"} for k in range(3)]
    record = {"id": "0", "images": ["a.png"], "prompt": "What is it?", "completions": answers}
    (tmp_path / "groups.jsonl").write_text(json.dumps(record) + "\n")
    options = ("--model", str(tiny_llava_dir), "--gpus-per-node", "1", "--groups", str(tmp_path / "groups.jsonl"))
    group = plan(tmp_path, *options, "--response-tokens", "50")["group"]
    assert (group["prompt_tokens"], group["response_tokens"], group["completions"]) == (20, 50, 3)
    report = plan(tmp_path, *options, "--completions", "2", "--groups-count", "7")
    assert (report["group"]["completions"], report["group"]["response_tokens"]) == (2, 3)
    assert report["groups_of_an_epoch"] == 7


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
