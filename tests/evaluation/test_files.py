"""COCO and POPE files are read as published; errors name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.files import read_coco, read_pope, read_synonyms


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def instances(**changes: Any) -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 7, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "bbox": [0, 0, 1, 1], "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 18},
        ],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 67, "name": "dining table"}],
    } | changes


def test_ground_truth_is_instances_and_captions(tmp_path: Path) -> None:
    captions = {
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "A desk."},
            {"id": 2, "image_id": 9, "caption": "A puppy at a table."},
            {"id": 3, "image_id": 555, "caption": "A puppy elsewhere."},
        ]
    }
    (tmp_path / "synonyms.txt").write_text("dog, puppy\n\ndining table, table, desk \n")
    coco = read_coco(
        write(tmp_path / "i.json", instances()), write(tmp_path / "c.json", captions), tmp_path / "synonyms.txt"
    )
    assert list(coco.file_of_image.items()) == [(9, "b.jpg"), (7, "a.jpg")]
    assert coco.present_of_image == {9: {"dog", "dining table"}, 7: {"dining table"}}


def test_without_synonyms_the_categories_are_the_names(tmp_path: Path) -> None:
    coco = read_coco(write(tmp_path / "i.json", instances()))
    assert coco.present_of_image == {9: {"dog"}, 7: frozenset()}
    assert [m.object for m in coco.lexicon.mentions("A puppy, a dog, two dining tables")] == ["dog", "dining table"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": None}, "list 'images' is missing"),
        ({"annotations": [{"image_id": 1, "category_id": 18}]}, r"annotations\[0\]: image_id 1 .* not declared"),
        ({"annotations": [{"image_id": 9}]}, r"annotations\[0\]: field 'category_id' is None"),
        ({"categories": [{"id": 18}]}, r"categories\[0\]: field 'name' is None"),
        ({"images": [{"id": 9, "file_name": "a"}, {"id": 9, "file_name": "b"}]}, "id 9 is used twice"),
    ],
)
def test_a_bad_instances_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_coco(write(tmp_path / "i.json", instances(**changes)))
    assert "i.json" in str(caught.value)


def test_mismatched_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "i.json", instances())
    (tmp_path / "synonyms.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="category 'dog' is not in the synonyms"):
        read_coco(path, synonyms=tmp_path / "synonyms.txt")
    captions = write(tmp_path / "c.json", {"annotations": [{"image_id": 1, "caption": "A dog."}]})
    with pytest.raises(ValueError, match="no caption is about an image"):
        read_coco(path, captions)
    with pytest.raises(ValueError, match="list 'images' is missing"):
        read_coco(write(tmp_path / "list.json", [1]))
    with pytest.raises(ValueError, match="cannot be read"):
        read_coco(tmp_path / "missing.json")


def test_unreadable_synonyms_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n,\n")
    with pytest.raises(ValueError, match="empty.txt: there are no objects"):
        read_synonyms(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="evaluation.synonyms"):
        read_synonyms(tmp_path / "missing.txt")


def pope_line(**changes: Any) -> str:
    entry = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"} | changes
    return json.dumps(entry) + "\n"


def test_pope_splits_come_from_the_file_name_or_a_field(tmp_path: Path) -> None:
    (tmp_path / "coco_pope_popular.json").write_text(pope_line() + pope_line(question_id=2, label="no"))
    (tmp_path / "mixed.jsonl").write_text(pope_line(category="adversarial") + pope_line(split="random") + pope_line())
    popular = read_pope(tmp_path / "coco_pope_popular.json")
    assert [(q.question_id, q.split, q.label) for q in popular] == [(1, "popular", True), (2, "popular", False)]
    assert [q.split for q in read_pope(tmp_path / "mixed.jsonl")] == ["adversarial", "random", "mixed"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": None}, "line 2: field 'label' is None; it must be yes or no"),
        ({"label": "maybe"}, "'maybe'"),
        ({"image": 3}, "line 2: field 'image' is 3"),
        ({"question_id": None}, "line 2: field 'question_id' is None"),
    ],
)
def test_a_bad_question_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "pope_random.json").write_text(pope_line() + pope_line(**changes))
    with pytest.raises(ValueError, match=message):
        read_pope(tmp_path / "pope_random.json")


def test_an_empty_question_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pope_random.json").write_text("\n")
    with pytest.raises(ValueError, match="no question"):
        read_pope(tmp_path / "pope_random.json")
