"""SHR's images from Visual Genome and its answer file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.evaluation.benchmarks.registry import BENCHMARKS
from tests.evaluation.benchmarks import judged_files


def test_images_come_from_visual_genome_in_the_order_of_the_question_file(tmp_path: Path) -> None:
    kind = BENCHMARKS["shr"]
    benchmark = kind.read(kind.Options(type="shr", **judged_files.shr(tmp_path)))
    assert [(q.id, q.image, q.text) for q in benchmark.questions] == [
        ("3", "VG_100K/3.jpg", "Describe this image in detail."),
        ("1", "VG_100K/1.jpg", "Describe this image in detail."),
    ]
    assert benchmark.answer_file(["A.", "B."]) == (".json", '{\n    "3": "A.",\n    "1": "B."\n}')


def test_an_image_that_visual_genome_lacks_is_named(tmp_path: Path) -> None:
    options = judged_files.shr(tmp_path)
    judged_files.write(tmp_path / "val_images_final.json", [{"image_id": 9}])
    kind = BENCHMARKS["shr"]
    with pytest.raises(ValueError, match=r"val_images_final.json, record 0: image_id 9 is not in .*image_data.json"):
        kind.read(kind.Options(type="shr", **options))
