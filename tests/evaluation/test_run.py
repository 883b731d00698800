"""`run_evaluation` on tiny models: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bpo.config.io import load_config
from bpo.config.training import Config, DataConfig, EvaluationConfig, ModelConfig
from bpo.evaluation.run import _identity, run_evaluation
from bpo.evaluation.suite import read_suite
from bpo.formats.bad_records import TooManyBadRecords
from bpo.model.load import load_model
from tests.evaluation.suites import write_files
from tests.tiny import tiny_llava, tiny_qwen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llava": tiny_llava(root / "llava"), "qwen": tiny_qwen(root / "qwen")}


def config_for(root: Path, model: Path, **changes: Any) -> Config:
    suite = write_files(root)
    options = {"output": str(root / "out" / "results.json"), "suite": str(suite), "batch_size": 2}
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(image_root=str(root)),
        evaluation=EvaluationConfig(**(options | changes)),
    )


def items(tree: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (found,) = [result for result in tree["benchmarks"] if result["name"] == name]
    return list(found["items"])


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_every_answer_and_metric_is_written_with_what_it_depends_on(
    tmp_path: Path, models: dict[str, Path], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, models[family])
    returned = run_evaluation(config, progress=False)
    output = Path(config.evaluation.output)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(returned))
    assert [item["image"] for item in items(written, "chair")] == ["a.png", "b.png", "c.png"]
    assert [item["id"] for item in items(written, "pope")] == [
        f"{s}/{n}" for s in ("random", "popular") for n in range(3)
    ]
    assert written["metrics"]["pope/accuracy"] == written["benchmarks"][1]["metrics"]["accuracy"]["value"]
    settings = written["benchmarks"][1]["settings"]
    assert (settings["num_questions"], settings["num_images"], settings["max_new_tokens"]) == (6, 3, 3)
    assert len(written["model"]["weights_sha256"]) == 64 and written["dtype"] == "float32"
    assert written["cost"]["relative_forward_passes"] == 1
    assert written["versions"]["bpo"] and written["hardware"]["ranks"] == 1
    captions = [json.loads(line) for line in output.with_name("results.chair.jsonl").read_text().splitlines()]
    assert captions == [{"image_id": n, "caption": item["answer"]} for n, item in enumerate(items(written, "chair"))]
    printed = capsys.readouterr().out
    assert "pope: 6 questions, 3 images, answers of" in printed and "lower is better" in printed
    assert str(output) in printed


def test_the_command_in_the_results_repeats_them(tmp_path: Path, models: dict[str, Path]) -> None:
    config = config_for(tmp_path, models["llava"], sample=2)
    config.evaluation.sampling.temperature = 0.7
    first = run_evaluation(config, progress=False)
    program, command, *flags = shlex.split(first["command"])
    assert (program, command) == ("bpo", "evaluate")
    again = load_config(flags)
    assert again == config
    assert run_evaluation(again, progress=False)["benchmarks"] == first["benchmarks"]


def test_an_adapter_is_evaluated_with_the_base_that_it_names(tmp_path: Path, models: dict[str, Path]) -> None:
    config = config_for(tmp_path, models["llava"])
    base = run_evaluation(config, progress=False)
    for number, same in ((0, True), (1, False)):
        torch.manual_seed(0)
        options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=same)
        adapted = get_peft_model(load_model(config.model), options)
        adapted.save_pretrained(tmp_path / str(number))
        changed = replace(config, model=replace(config.model, path=str(tmp_path / str(number))))
        result = run_evaluation(changed, progress=False)
        assert (result["benchmarks"] == base["benchmarks"]) == same
        assert result["model"]["base"] == str(models["llava"])
        assert result["model"]["weights_sha256"] != base["model"]["weights_sha256"]


def test_answers_do_not_depend_on_the_batch_size(tmp_path: Path, models: dict[str, Path]) -> None:
    whole = run_evaluation(config_for(tmp_path, models["llava"], batch_size=3), progress=False)
    single = run_evaluation(config_for(tmp_path, models["llava"], batch_size=1), progress=False)
    assert whole["benchmarks"] == single["benchmarks"]


def test_flags_build_a_suite_of_chair_and_pope(tmp_path: Path, models: dict[str, Path]) -> None:
    by_file = run_evaluation(config_for(tmp_path, models["llava"]), progress=False)
    options = {"suite": "", "chair_instances": str(tmp_path / "instances.json"), "max_new_tokens": 3}
    pope = [str(tmp_path / f"pope_{split}.json") for split in ("random", "popular")]
    both = run_evaluation(config_for(tmp_path, models["llava"], **options, pope_questions=pope), progress=False)
    assert both["metrics"] == by_file["metrics"]
    alone = run_evaluation(config_for(tmp_path, models["llava"], **options), progress=False)
    assert [result["name"] for result in alone["benchmarks"]] == ["chair"]


def test_given_answers_score_as_if_the_model_had_just_given_them(tmp_path: Path, models: dict[str, Path]) -> None:
    config = config_for(tmp_path, models["llava"])
    generated = run_evaluation(config, progress=False)
    scored_apart = replace(config.evaluation, output=str(tmp_path / "again.json"), answers=config.evaluation.output)
    (tmp_path / "c.png").unlink()  # images are not needed
    again = run_evaluation(Config(evaluation=scored_apart))
    assert again["benchmarks"] == generated["benchmarks"] and again["answers"] == config.evaluation.output
    assert "model" not in again


def test_refusals_come_before_the_model_is_loaded(tmp_path: Path) -> None:
    nowhere = tmp_path / "no_model"
    with pytest.raises(ValueError, match="evaluation.output is empty"):
        run_evaluation(config_for(tmp_path, nowhere, output=""))
    with pytest.raises(ValueError, match="nothing to measure"):
        run_evaluation(config_for(tmp_path, nowhere, suite=""))
    with pytest.raises(ValueError, match="chair_captions is set without"):
        run_evaluation(config_for(tmp_path, nowhere, suite="", chair_captions="c.json"))
    config = config_for(tmp_path, nowhere)
    (tmp_path / "c.png").unlink()
    with pytest.raises(TooManyBadRecords, match="1 of 3 records are bad.*'c.png' is missing"):
        run_evaluation(config)
    config.data.on_bad = "error"
    with pytest.raises(ValueError, match="'c.png' is missing"):
        run_evaluation(config)


def test_a_benchmark_goes_on_without_few_unusable_images_and_says_so(tmp_path: Path, models: dict[str, Path]) -> None:
    config = config_for(tmp_path, models["llava"])
    config.data.max_bad_share = 0.5
    (tmp_path / "b.png").write_bytes(b"no picture")
    result = run_evaluation(config, progress=False)
    assert [item["image"] for item in items(result, "chair")] == ["a.png", "c.png"]
    assert [item["id"] for item in items(result, "pope")] == ["random/0", "random/2", "popular/0", "popular/2"]
    assert [(entry["record"], entry["code"]) for entry in result["bad_images"]] == [("b.png", "image-undecodable")]


def test_answers_to_other_pixels_prompts_or_decoding_are_not_reused(tmp_path: Path, models: dict[str, Path]) -> None:
    config = config_for(tmp_path, models["qwen"])
    suite = read_suite(config.evaluation)
    capped = replace(config, data=replace(config.data, max_pixels=3136))
    padded = replace(config, data=replace(config.data, image_aspect="pad"))
    prompted = replace(config, data=replace(config.data, system_prompt="Be brief."))
    contrasted = replace(config, evaluation=replace(config.evaluation, decoding="vcd"))
    changed = [_identity(c, suite) for c in (config, capped, padded, prompted, contrasted)]
    assert len({*changed, _identity(config, replace(suite, benchmarks=suite.benchmarks[:1]))}) == 6
