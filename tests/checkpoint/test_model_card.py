"""The card of an export: valid for the Hub, complete, and without the folders of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.checkpoint.export import run_export
from bpo.checkpoint.model_card import hub_id, model_card, read_metrics
from bpo.config.bootstrap import BootstrapConfig, SegmentConfig
from bpo.config.io import to_tree
from bpo.config.loss import TermConfig
from bpo.config.online import OnlineConfig
from bpo.config.training import Config, DataConfig, ExportConfig, LossConfig, ModelConfig, TrainConfig
from tests.trained_checkpoint import LORA, perturbed, write_checkpoint

BASE = "/home/someone/.cache/huggingface/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/1234"
RESULTS = [
    {"name": "pope", "metrics": {"f1": {"value": 0.85123, "low": 0.83, "high": 0.87}, "yes_share": {"value": 0.5}}}
]


def card(
    record: dict[str, Any] | None = None,
    base: str = BASE,
    metrics: Any = (),
    sections: dict[str, Any] | None = None,
    **loss: Any,
) -> str:
    trained = Config(
        model=ModelConfig(path=BASE),
        data=DataConfig(groups="/home/someone/data/groups.jsonl", image_root="~/images"),
        loss=LossConfig(**loss),
        train=TrainConfig(output_dir="/home/someone/runs/first", lr=5e-7, completion_types=["gt", "mllm-hal"]),
    )
    trained = replace(trained, **(sections or {}))
    manifest = {
        "step": 1200,
        "world_size": 8,
        "cursor": {"steps_planned": 1300, "groups_done": 38400},
        "fingerprints": {"data": "d" * 64, "weights": "e" * 64},
        "versions": {"bpo": "1.0", "torch": "2.13"},
        "config": to_tree(trained),
    }
    export = ExportConfig(checkpoint="/home/someone/runs/first", output="/home/someone/model", metrics="/home/x/r.json")
    config = Config(model=ModelConfig(path=base), export=export)
    return model_card("model", config, manifest, record or {"form": "merged"}, ["| a | b |"], list(metrics), "abc123")


def test_it_names_the_annotations_and_the_options_of_negatives_of_an_online_run() -> None:
    segment = BootstrapConfig(segment=SegmentConfig(max_tokens=64))
    assert "bootstrap" not in card(sections={"bootstrap": segment})
    online = {"data": DataConfig(annotations="/a/llava.json"), "online": OnlineConfig(source="segment")}
    text = card(sections={"bootstrap": segment, **online})
    assert "| data | `llava.json` |" in text
    assert "--online.source=segment --bootstrap.segment.max_tokens=64" in text


def test_the_hub_accepts_it() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="validates cards")
    data = hub.ModelCard(card()).data.to_dict()
    assert data == {
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bpo", "preference-optimization", "sigmoid"],
    }
    assert hub.ModelCard(card({"form": "adapter"})).data.library_name == "peft"
    local = hub.ModelCard(card(base="/data/my-model"))
    assert local.data.base_model is None and "`my-model`" in local.text  # a name that the Hub would resolve wrongly
    terms = [TermConfig(type="sigmoid"), TermConfig(type="nca_pair")]
    assert hub.ModelCard(card(terms=terms)).data.tags[2:] == ["nca_pair", "sigmoid"]


def test_it_says_how_the_model_was_made_without_the_folders_of_the_machine() -> None:
    text = card()
    for folder in ("/home", "someone", "~", ".cache"):
        assert folder not in text
    for fact in (
        "| optimizer steps | 1,200 of 1,300 |",
        "| groups seen, with repetitions | 38,400 |",
        "| data | `groups.jsonl` |",
        f"| SHA-256 of the data | {'d' * 64} |",
        "| ranks | 8 |",
        "| versions | bpo 1.0, torch 2.13 |",
        "| commit of bpo | abc123 |",
        "--train.lr=5e-07",
        """'--train.completion_types=["gt", "mllm-hal"]'""",
        "bpo export --model.path=llava-hf/llava-1.5-7b-hf --export.checkpoint=first --export.output=model",
        "| a | b |",
    ):
        assert fact in text, fact
    assert "## Evaluation" not in text


@pytest.mark.parametrize("benchmarks", [RESULTS, {"pope": {"metrics": RESULTS[0]["metrics"]}}])
def test_metrics_are_given_with_intervals(tmp_path: Path, benchmarks: Any) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"benchmarks": benchmarks}))
    text = card(metrics=read_metrics(str(tmp_path / "r.json")))
    assert "| pope | f1 | 0.8512 | [0.83, 0.87] |" in text
    assert "| pope | yes_share | 0.5 |  |" in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "give the JSON file"),
        ("[]", "missing or empty"),
        ('{"benchmarks": {}}', "missing or empty"),
        ('{"benchmarks": [{"name": "pope"}]}', "not as `bpo evaluate` writes it: KeyError"),
        ('{"benchmarks": [3]}', "not as `bpo evaluate` writes it: TypeError"),
    ],
)
def test_another_file_is_refused_before_anything_is_exported(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "r.json").write_text(content)
    options = ExportConfig(checkpoint="run", output=str(tmp_path / "out"), metrics=str(tmp_path / "r.json"))
    with pytest.raises(ValueError, match=f"export.metrics .*r.json.*{problem}"):
        run_export(Config(export=options))


@pytest.mark.parametrize(
    ("path", "name"),
    [(BASE, "llava-hf/llava-1.5-7b-hf"), ("a/b", "a/b"), ("tests/checkpoint", ""), ("/models/a/b", ""), ("../a/b", "")],
)
def test_hub_ids(path: str, name: str, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    assert hub_id(path) == name


def test_metrics_can_be_added_to_a_finished_export(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """The model is evaluated after it was exported. The base model's own card is not taken over."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_llava_dir.iterdir():
        (base / file.name).symlink_to(file)
    (base / "README.md").write_text("# card of the base")
    (base / "LICENSE").write_text("terms")
    config = Config(model=ModelConfig(path=str(base), dtype="float32"), lora=LORA)
    write_checkpoint(tmp_path / "run", perturbed(config, 0.1), config)
    (tmp_path / "run" / "versions.txt").write_text("commit: 0123abc\ntorch: 2\n")
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "run"), "output": str(tmp_path / "out")}
    output = run_export(Config(export=ExportConfig(**options), model=config.model))
    first = (output / "README.md").read_text()
    assert "card of the base" not in first and (output / "LICENSE").read_text() == "terms"
    assert "| commit of bpo | 0123abc |" in first and "Log-probs were not compared: data.groups is not given" in first
    others = {file: file.stat().st_mtime_ns for file in output.iterdir() if file.name != "README.md"}
    (tmp_path / "r.json").write_text(json.dumps({"benchmarks": RESULTS}))
    run_export(Config(export=ExportConfig(**options, metrics=str(tmp_path / "r.json")), model=config.model))
    second = (output / "README.md").read_text()
    assert "| pope | f1 | 0.8512 | [0.83, 0.87] |" in second
    assert "| change of the weights that survived | 100.0 % |" in first and "100.0 %" in second
    assert others == {file: file.stat().st_mtime_ns for file in output.iterdir() if file.name != "README.md"}
