"""COCO files are read as published; errors name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmark import Question
from bpo.evaluation.files import id_field, present_objects, read_coco, read_synonyms, text_field, unique_ids
from bpo.formats.lexicon import build_lexicon


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
    with pytest.raises(ValueError, match="check the option synonyms"):
        read_synonyms(tmp_path / "missing.txt")


def test_present_is_instances_and_captions_together() -> None:
    lexicon = build_lexicon([["dining table", "table", "desk"], ["dog", "puppy"]])
    assert present_objects(lexicon, ["dining table"], ["A puppy under the desk."]) == {"dining table", "dog"}
    with pytest.raises(ValueError, match="'unicorn' is not in the synonyms"):
        present_objects(lexicon, ["unicorn"])


def test_fields_and_ids_are_checked() -> None:
    assert id_field({"id": 3}, "id", "f, line 1") == 3 and text_field({"t": ""}, "t", "f") == ""
    with pytest.raises(ValueError, match="f, line 1: field 'id' is True; it must be text or an integer"):
        id_field({"id": True}, "id", "f, line 1")
    with pytest.raises(ValueError, match="f: field 't' is None; it must be text"):
        text_field([], "t", "f")
    questions = [Question(id=name, image="", text="") for name in ("a", "b", "b")]
    unique_ids(questions[:2], "f")
    with pytest.raises(ValueError, match="f: question id 'b' is used twice"):
        unique_ids(questions, "f")
