"""Training under data.on_bad and data.max_bad_share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bpo.cli import main
from bpo.config.training import Config, DataConfig, ModelConfig, TrainConfig
from bpo.formats.bad_records import TooManyBadRecords
from bpo.formats.check import check_data
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


@pytest.mark.parametrize("keep_text_only", [False, True])
@pytest.mark.parametrize("types", [(), ("rejected",), ("none-of-these",)])
def test_check_counts_what_training_uses(
    tmp_path: Path, tiny_llava_dir: Path, photo_root: Path, keep_text_only: bool, types: tuple[str, ...]
) -> None:
    pair = {"prompt": "What?", "chosen": "a cat", "rejected": "a dog", "images": ["wide.png"]}
    embedded = [{"bytes": None, "path": "wide.png"}, "data:image/png;base64,iVBORw0KGgoAAAA"]
    rows: list[dict[str, Any]] = [pair, pair | {"id": "twice"}, pair | {"id": "twice"}]
    rows += [
        pair | {"images": images} for images in ([], None, [None], [""], ["missing.png"], embedded[:1], embedded[1:])
    ]
    rows += [pair | {"rejected": "a cat"}, pair | {"rejected": "a dog " * 400}, pair | {"rejected": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
        data=DataConfig(
            groups=str(path),
            image_root=str(photo_root),
            num_workers=0,
            max_bad_share=1.0,
            text_only="keep" if keep_text_only else "drop",
        ),
        train=TrainConfig(output_dir=str(tmp_path / "run"), completion_types=list(types)),
    )
    found = check_data(path, image_root=photo_root, keep_text_only=keep_text_only, types=types)
    assert found.num_trained + found.unused.total() == len(rows)
    if types == ("none-of-these",):
        assert found.num_trained == 0
        with pytest.raises(ValueError, match="no group can be trained on"):
            measure(config, tiny_llava_dir, photo_root)
        return
    assert len(measure(config, tiny_llava_dir, photo_root).usable) == found.num_trained == (6 if keep_text_only else 4)


def test_check_counts_embedded_images_as_training_does(
    tmp_path: Path, tiny_llava_dir: Path, photo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [{"bytes": (photo_root / "wide.png").read_bytes(), "path": "wide.png"}]
    rows = [{"prompt": "What?", "chosen": "a cat", "rejected": "a dog", "images": images}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert main(["check", str(path), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "1 usable, 0 bad" in printed and "bpo train would use 0 of 1 groups" in printed
    assert "1 image-embedded (extract it with `bpo convert --images`)" in printed
    assert "bpo train stops: 1 of 1 records are bad, more than data.max_bad_share allows (0.1)" in printed
    assert main(["convert", str(path), str(tmp_path / "g.jsonl"), "--images", str(tmp_path / "images")]) == 0
    assert check_data(tmp_path / "g.jsonl", image_root=tmp_path / "images").num_trained == 1
