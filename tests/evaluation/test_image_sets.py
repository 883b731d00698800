"""Samples and lists of images."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bpo.evaluation.image_sets import listed_images, sampled_images

COCO = tuple(f"val2014/COCO_val2014_{number:012d}.jpg" for number in (42, 73, 1000, 524288))


def test_a_sample_depends_on_neither_order_nor_folder() -> None:
    images = [f"{number}.png" for number in range(200)]
    drawn = sampled_images(images, 50, seed=3)
    shuffled = random.Random(0).sample(images, len(images))
    assert sampled_images(shuffled, 50, seed=3) == drawn and len(set(drawn)) == 50
    assert sampled_images([f"train/{image}" for image in images], 50, seed=3) == tuple(f"train/{i}" for i in drawn)
    assert sampled_images(images, 50, seed=4) != drawn and set(drawn) != set(images[:50])


def test_a_sample_of_part_of_the_images_keeps_those_drawn_before() -> None:
    images = [f"{number}.png" for number in range(200)]
    drawn = sampled_images(images, 50, seed=3)
    assert set(sampled_images(images[:150], 50, seed=3)) >= set(drawn) & set(images[:150])
    assert len(sampled_images(images, 500, seed=3)) == 200


def test_samples_are_uniform() -> None:
    images = [f"{number}.png" for number in range(10)]
    counts = dict.fromkeys(images, 0)
    for seed in range(2000):
        for image in sampled_images(images, 3, seed):
            counts[image] += 1
    assert all(abs(count - 600) < 100 for count in counts.values())  # 600 expected, standard deviation 20


@pytest.mark.parametrize("line", [COCO[0], Path(COCO[0]).name, Path(COCO[0]).stem, "42", "000000000042"])
def test_a_line_names_an_image_by_path_name_or_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"\n{line}\n{line}\n{COCO[2]}\n")
    assert listed_images(path, COCO, "chair", complete=True) == (COCO[0], COCO[2])


def test_lines_without_an_image_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{COCO[0]}\n43\nphoto_42.jpg\n")
    with pytest.raises(ValueError, match=r"2 lines are no images of chair, such as line 2 \('43'\)"):
        listed_images(path, COCO, "chair", complete=True)
    assert listed_images(path, COCO, "chair", complete=False) == COCO[:1]
    with pytest.raises(ValueError, match="2 images of chair; write the path"):
        path.write_text("a.png\n")
        listed_images(path, ["x/a.png", "y/a.png"], "chair", complete=False)
    with pytest.raises(ValueError, match=r"none.txt cannot be read"):
        listed_images(tmp_path / "none.txt", COCO, "chair", complete=True)
