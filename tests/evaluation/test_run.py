"""`run_evaluation` on tiny models: what it writes, prints and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bpo.config.training import Config, DataConfig, EvaluationConfig, ModelConfig
from bpo.evaluation.chair import score_descriptions
from bpo.evaluation.pope import PopeQuestion, score_answers
from bpo.evaluation.run import EvaluationResult, _identity, format_table, read_benchmarks, run_evaluation
from bpo.formats.bad_records import TooManyBadRecords
from bpo.formats.lexicon import build_lexicon
from tests.tiny import tiny_llava, tiny_qwen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llava": tiny_llava(root / "llava"), "qwen": tiny_qwen(root / "qwen")}


def config_for(root: Path, model: Path, **changes: object) -> Config:
    names = ["a.png", "b.png", "c.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (80 * number, 90, 40)).save(root / name)
    instances = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": 0, "category_id": 1}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (root / "instances.json").write_text(json.dumps(instances))
    for split in ("random", "popular"):
        lines = [{"question_id": n, "image": name, "text": "A dog?", "label": "no"} for n, name in enumerate(names)]
        (root / f"pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    options = {
        "output": str(root / "out" / "results.json"),
        "chair_instances": str(root / "instances.json"),
        "pope_questions": [str(root / "pope_random.json"), str(root / "pope_popular.json")],
        "max_new_tokens": 3,
        "batch_size": 2,
    }
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(image_root=str(root)),
        evaluation=EvaluationConfig(**(options | changes)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_every_answer_and_metric_is_written(
    tmp_path: Path, models: dict[str, Path], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, models[family])
    returned = run_evaluation(config, progress=False)
    written = json.loads(Path(config.evaluation.output).read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(returned))
    assert [d["image"] for d in written["chair"]["descriptions"]] == ["a.png", "b.png", "c.png"]
    assert written["chair"]["descriptions"][0]["present"] == ["dog"]
    assert set(written["pope"]["splits"]) == {"random", "popular"}
    assert len(written["pope"]["answers"]) == 6
    assert all(answer["read_as"] in ("yes", "no") for answer in written["pope"]["answers"])
    assert set(written["metrics"]) == {"chair_i", "chair_s", "recall", "pope_accuracy", "pope_f1", "pope_yes_ratio"}
    printed = capsys.readouterr().out
    assert "yes_ratio" in printed and "average" in printed and config.evaluation.output in printed


def test_answers_do_not_depend_on_the_batch_size_and_limit_cuts(tmp_path: Path, models: dict[str, Path]) -> None:
    whole = run_evaluation(config_for(tmp_path, models["llava"], batch_size=3), progress=False)
    cut = run_evaluation(config_for(tmp_path, models["llava"], batch_size=1, limit=2), progress=False)
    assert cut["chair"]["descriptions"] == whole["chair"]["descriptions"][:2]
    assert [a["question_id"] for a in cut["pope"]["answers"]] == [0, 1, 0, 1]
    assert [a["answer"] for a in cut["pope"]["answers"][:2]] == [a["answer"] for a in whole["pope"]["answers"][:2]]


def test_one_benchmark_alone(tmp_path: Path, models: dict[str, Path]) -> None:
    result = run_evaluation(config_for(tmp_path, models["llava"], pope_questions=[]), progress=False)
    assert result["pope"] is None and set(result["metrics"]) == {"chair_i", "chair_s", "recall"}


def test_refusals_come_before_the_model_is_loaded(tmp_path: Path) -> None:
    nowhere = tmp_path / "no_model"
    with pytest.raises(ValueError, match="evaluation.output is empty"):
        run_evaluation(config_for(tmp_path, nowhere, output=""))
    with pytest.raises(ValueError, match="nothing to measure"):
        run_evaluation(config_for(tmp_path, nowhere, chair_instances="", pope_questions=[]))
    with pytest.raises(ValueError, match="chair_captions is set without"):
        run_evaluation(config_for(tmp_path, nowhere, chair_instances="", chair_captions="c.json"))
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
    assert [d["image"] for d in result["chair"]["descriptions"]] == ["a.png", "c.png"]
    assert [a["question_id"] for a in result["pope"]["answers"]] == [0, 2, 0, 2]
    assert [(entry["record"], entry["code"]) for entry in result["bad_images"]] == [("b.png", "image-undecodable")]


def test_answers_to_other_pixels_or_prompts_are_not_reused(tmp_path: Path, models: dict[str, Path]) -> None:
    config = config_for(tmp_path, models["qwen"])
    capped = replace(config, data=replace(config.data, max_pixels=3136))
    benchmarks = read_benchmarks(config.evaluation)
    padded = replace(config, data=replace(config.data, image_aspect="pad"))
    prompted = replace(config, data=replace(config.data, system_prompt="Be brief."))
    assert len({_identity(c, benchmarks) for c in (config, capped, padded, prompted)}) == 4


def test_the_table_shows_percentages() -> None:
    lexicon = build_lexicon([["dog"], ["cat"]])
    chair = score_descriptions([(1, "A dog and a cat.")], {1: frozenset({"dog"})}, lexicon)
    pope = score_answers([PopeQuestion(1, "random", "a.png", "A dog?", True)], ["Yes"])
    assert format_table(EvaluationResult(chair, pope)).splitlines() == [
        "       chair_i  chair_s  recall",
        "CHAIR     50.0    100.0   100.0",
        "",
        "POPE     accuracy  precision  recall     f1  yes_ratio",
        "random      100.0      100.0   100.0  100.0      100.0",
        "average     100.0      100.0   100.0  100.0      100.0",
    ]
