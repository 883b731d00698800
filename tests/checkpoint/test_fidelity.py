"""An export is compared with the trained model on groups, and refused if it lost what training did."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.checkpoint import export
from bpo.checkpoint.export import RECORD, run_export
from bpo.checkpoint.fidelity import Fidelity, NoSampleError, judge, sample_groups, table
from bpo.checkpoint.merge import WeightChange
from bpo.config.training import Config, DataConfig, ExportConfig, LoraConfig, ModelConfig, TrainableConfig
from bpo.formats.schema import group_to_json
from tests.sample_groups import encoder_of, group
from tests.trained_checkpoint import LORA, perturbed, write_checkpoint, write_groups

# Of B, at which half of the change of bfloat16 weights is lost: rms(dW) = 6e-5, weights of about 0.1.
SMALL = 1.5e-4


@pytest.fixture(scope="module")
def data(photo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write_groups(tmp_path_factory.mktemp("data") / "groups.jsonl", photo_root)


def trained_run(run: Path, base: Path, data: DataConfig, *, scale: float = SMALL, **sections: Any) -> Path:
    """A run in bfloat16 whose adapter's B, or whose weights, moved by `scale`."""
    config = Config(model=ModelConfig(path=str(base), dtype="bfloat16"), **{"lora": LORA, "data": data, **sections})
    write_checkpoint(run, perturbed(config, scale, "" if config.trainable.language == "full" else "lora_B"), config)
    return run


@pytest.fixture(scope="module")
def small(tiny_llava_dir: Path, data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("run"), tiny_llava_dir, data)


def exported(run: Path, base: Path, output: Path, data: DataConfig | None = None, **options: Any) -> dict[str, Any]:
    """The record of an export."""
    settings = ExportConfig(checkpoint=str(run), output=str(output), **options)
    run_export(Config(export=settings, model=ModelConfig(path=str(base)), data=data or DataConfig()))
    return json.loads((output / RECORD).read_text())


def test_a_merge_that_loses_the_training_is_refused(small: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not the trained one: [1-4]\d\.\d % of the change of the weights survived"
    ) as error:
        exported(small, tiny_llava_dir, tmp_path / "out")
    for fix in ("--export.dtype float32", "--export.rounding stochastic", "--export.form adapter"):
        assert fix in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wider_dtype_keeps_the_training(
    small: Path, tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The groups are those of the training, which its checkpoint names."""
    with caplog.at_level(logging.INFO):
        record = exported(small, tiny_llava_dir, tmp_path / "out", dtype="float32")
    assert record["weights"]["survived"] == pytest.approx(1, abs=1e-6)
    tokens = record["log_probs"]
    assert (tokens["num_groups"], tokens["answers"], tokens["answers_differ"]) == (3, 3, 0)
    assert tokens["survived"] == pytest.approx(1, abs=0.01) and tokens["mean_gap"] < 0.01 * tokens["mean_change"]
    assert "| change of log-probs that survived | 100.0 % |" in caplog.text
    assert "lost part" not in caplog.text
    assert '"dtype": "float32"' in (tmp_path / "out" / "config.json").read_text()


def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses(
    small: Path, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    options = {"rounding": "stochastic", "max_gap": 10.0, "check_groups": 2}
    record = exported(small, tiny_llava_dir, tmp_path / "out", **options)
    assert record["log_probs"]["num_groups"] == 2
    assert record["weights"]["survived"] > 0.9 and record["log_probs"]["survived"] > 0.5
    assert record["rounding"] == "stochastic"


def test_an_export_of_other_weights_is_refused(
    tiny_llava_dir: Path, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the merge reports of itself: what counts is read back from disk."""
    run = trained_run(tmp_path / "run", tiny_llava_dir, data, scale=0.05)
    monkeypatch.setattr(export, "merge_into", lambda *_, **__: WeightChange(change=1.0, kept=1.0))
    with pytest.raises(ValueError, match=r"0\.0 % of the change of the log-probs.*by 1\.00 times what training"):
        exported(run, tiny_llava_dir, tmp_path / "out")


def test_an_adapter_is_compared_as_peft_loads_it(small: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    record = exported(small, tiny_llava_dir, tmp_path / "out", form="adapter")
    assert record["log_probs"]["mean_change"] > 0 and record["log_probs"]["max_gap"] < 1e-6
    assert record["vllm"]["accepted"] is False and "projector" in record["vllm"]["detail"]


def test_full_fine_tuning_is_cast_and_compared(tiny_llava_dir: Path, data: DataConfig, tmp_path: Path) -> None:
    full = TrainableConfig(language="full")
    run = trained_run(tmp_path / "run", tiny_llava_dir, data, scale=0.01, trainable=full, lora=LoraConfig())
    record = exported(run, tiny_llava_dir, tmp_path / "out", dtype="float16")
    assert record["weights"]["survived"] == pytest.approx(1, abs=1e-3)
    assert record["log_probs"]["survived"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("why", ["no groups", "no images", "off"])
def test_what_was_not_compared_is_said(
    tiny_llava_dir: Path, data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    gone = str(tmp_path / "gone")
    then = {"no groups": replace(data, groups=gone), "no images": replace(data, image_root=gone), "off": data}[why]
    run = trained_run(tmp_path / "run", tiny_llava_dir, then, scale=0.05)
    record = exported(run, tiny_llava_dir, tmp_path / "out", check_groups=0 if why == "off" else 16)
    reason = {
        "no groups": "data.groups is not given, and the file of the training is not here",
        "no images": "no group to compare the export on",
        "off": "export.check_groups is 0",
    }[why]
    assert reason in record["not_compared"] and record["log_probs"] is None
    assert f"NOT COMPARED: {record['not_compared']}" in caplog.text
    assert record["weights"]["survived"] > 0.99  # known without any group
    if why != "off":
        with pytest.raises(ValueError, match="no such file to compare|no group to compare"):
            exported(run, tiny_llava_dir, tmp_path / "other", then)


def test_the_sample_depends_on_ids_not_on_their_order(tiny_llava_dir: Path, photo_root: Path, tmp_path: Path) -> None:
    groups = [group(f"g{number}", f"answer {number}", "other") for number in range(20)]
    encoder = encoder_of(tiny_llava_dir, photo_root)
    chosen = []
    for seed in range(2):
        path = tmp_path / f"{seed}.jsonl"
        order = random.Random(seed).sample(groups, len(groups))
        path.write_text("not a record\n" + "".join(json.dumps(group_to_json(one)) + "\n" for one in order))
        config = Config(data=DataConfig(groups=str(path)), export=ExportConfig(check_groups=4))
        chosen.append([encoded.completion_ids for encoded in sample_groups(config, encoder)])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 4
    missing = encoder_of(tiny_llava_dir, tmp_path)
    with pytest.raises(NoSampleError, match=r"wide.png.*--export.check_groups 0"):
        sample_groups(config, missing)


def figures(**changes: Any) -> Fidelity:
    return Fidelity(
        **{
            "num_groups": 3,
            "num_tokens": 60,
            "mean_change": 0.1,
            "mean_gap": 0.001,
            "max_gap": 0.01,
            "survived": 0.99,
            "answers": 3,
            "answers_differ": 0,
            "dtype": "float32",
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("weights", "changes", "outcome"),
    [
        (0.99, {}, ""),
        (0.8, {}, "warns"),
        (0.4, {}, "refuses"),
        (0.99, {"survived": 0.4}, "refuses"),
        (0.99, {"mean_gap": 0.2}, "refuses"),
        (0.99, {"mean_gap": 5e-6, "survived": 0.1, "mean_change": 6e-6}, ""),  # rounding of the arithmetic
        (0.99, {"mean_gap": 0.01, "survived": 0.1, "dtype": "bfloat16"}, ""),
    ],
)
def test_limits(weights: float, changes: dict[str, Any], outcome: str, caplog: pytest.LogCaptureFixture) -> None:
    if outcome == "refuses":
        with pytest.raises(ValueError, match="not the trained one"):
            judge(ExportConfig(), {"survived": weights}, figures(**changes))
        judge(ExportConfig(min_survived=0.0, max_gap=10.0), {"survived": weights}, figures(**changes))
    else:
        judge(ExportConfig(), {"survived": weights}, figures(**changes))
        assert ("lost part of the training: 80.0 %" in caplog.text) == (outcome == "warns")
    assert "training changed nothing" not in caplog.text


def test_a_training_that_did_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    nothing = figures(mean_change=0.0, mean_gap=0.0, max_gap=0.0, survived=None)
    judge(ExportConfig(), {}, nothing)
    assert "training changed nothing" in caplog.text
    assert "| change of log-probs that survived | no change |" in table({}, nothing)
