"""What may change between the starts of a bootstrapping job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bpo.bootstrap.job.identity import check_identity
from bpo.config.training import Config, DataConfig


def test_a_job_is_not_continued_with_other_pixel_limits(photos: Path, tmp_path: Path) -> None:
    config = Config(data=DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos)))
    check_identity(config, tmp_path / "job")
    check_identity(config, tmp_path / "job")
    capped = replace(config, data=replace(config.data, max_pixels=3136))
    with pytest.raises(ValueError, match="data.max_pixels was None, is 3136"):
        check_identity(capped, tmp_path / "job")
