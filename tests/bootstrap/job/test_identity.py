"""What may change between the starts of a bootstrapping job."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bpo.bootstrap.job.identity import check_identity
from bpo.config.training import Config, DataConfig, ModelConfig


def test_a_job_is_not_continued_with_other_pixel_limits(photos: Path, tmp_path: Path) -> None:
    config = Config(data=DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos)))
    check_identity(config, tmp_path / "job")
    check_identity(config, tmp_path / "job")
    capped = replace(config, data=replace(config.data, max_pixels=3136))
    with pytest.raises(ValueError, match="data.max_pixels was None, is 3136"):
        check_identity(capped, tmp_path / "job")
    faithful = replace(config, data=replace(config.data, image_aspect="pad", system_prompt="Be brief."))
    with pytest.raises(ValueError, match="data.image_aspect was None, is 'pad' .*; data.system_prompt was None, is 'Be b"):
        check_identity(faithful, tmp_path / "job")


def test_a_note_beside_the_model_changes_nothing_and_another_tokenizer_does(
    photos: Path, tmp_path: Path, tiny_llava_dir: Path
) -> None:
    model = Path(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    data = DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos))
    config = Config(model=ModelConfig(path=str(model)), data=data)
    check_identity(config, tmp_path / "job")
    (model / "notes.txt").write_text("from the archive")
    check_identity(config, tmp_path / "job")
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"model.path \(weights\) was"):
        check_identity(config, tmp_path / "job")


@pytest.mark.parametrize("content", ["", "{", "5", "[1]"])
def test_a_damaged_identity_is_named(photos: Path, tmp_path: Path, content: str) -> None:
    config = Config(data=DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos)))
    check_identity(config, tmp_path / "job")
    (tmp_path / "job" / "job.json").write_text(content)
    with pytest.raises(ValueError, match=r"job.json is damaged .*start over"):
        check_identity(config, tmp_path / "job")
