"""Training under data.on_bad and data.max_bad_share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.config.training import Config, DataConfig, ModelConfig, TrainConfig
from bpo.formats.bad_records import TooManyBadRecords
from bpo.formats.files import group_to_json
from bpo.job.launch import Ranks
from bpo.training.measure import TrainingData, measure_groups
from tests.sample_groups import encoder_of, group


def config_with(root: Path, model: Path, photos: Path, **data: object) -> Config:
    """Five groups: one image is missing, one record is damaged."""
    groups = [group(str(n), "a cat", "a dog", image="missing.png" if n == 2 else "wide.png") for n in range(4)]
    lines = [json.dumps(group_to_json(group)) for group in groups]
    (root / "groups.jsonl").write_text("\n".join([*lines, '{"id": "torn", "images"']))
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(photos), num_workers=0, **data),  # type: ignore[arg-type]
        train=TrainConfig(output_dir=str(root / "run")),
    )


def measure(config: Config, model: Path, photos: Path) -> TrainingData:
    return measure_groups(config, encoder_of(model, photos), Ranks(), lambda results: [results])


def test_bad_groups_are_listed_with_dropped_ones(tmp_path: Path, tiny_llava_dir: Path, photo_root: Path) -> None:
    data = measure(config_with(tmp_path, tiny_llava_dir, photo_root, max_bad_share=0.4), tiny_llava_dir, photo_root)
    assert [data.dataset.groups[index].id for index in data.usable] == ["0", "1", "3"]
    dropped = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in dropped] == ["torn-record", "bad-image"]
    assert dropped[0]["id"].endswith("groups.jsonl, line 5") and dropped[1]["id"] == "2"


def test_groups_left_out_in_reading_are_listed_too(tmp_path: Path, tiny_llava_dir: Path, photo_root: Path) -> None:
    config = config_with(tmp_path, tiny_llava_dir, photo_root, max_bad_share=0.4)
    marked = group_to_json(group("marked", "a cat", "<image>"))
    video = group_to_json(group("video", "a cat", "a dog")) | {"video": "clip.mp4"}
    with (tmp_path / "groups.jsonl").open("a") as file:
        file.writelines(f"\n{json.dumps(record)}" for record in (marked, video))
    assert len(measure(config, tiny_llava_dir, photo_root).usable) == 3
    dropped = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in dropped}
    assert (reasons["marked"], reasons["video"]) == ("marker-in-answer", "other-media")


def test_above_the_ceiling_and_with_error_nothing_is_trained(
    tmp_path: Path, tiny_llava_dir: Path, photo_root: Path
) -> None:
    config = config_with(tmp_path, tiny_llava_dir, photo_root, max_bad_share=0.39)
    with pytest.raises(TooManyBadRecords, match="2 of 5 records are bad"):
        measure(config, tiny_llava_dir, photo_root)
    assert (tmp_path / "run" / "dropped.jsonl").exists()
    config.data.on_bad = "error"
    with pytest.raises(ValueError, match="line 5: not JSON"):
        measure(config, tiny_llava_dir, photo_root)
    lines = (tmp_path / "groups.jsonl").read_text().splitlines()[:-1]
    (tmp_path / "groups.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="'missing.png' is missing"):
        measure(config, tiny_llava_dir, photo_root)
