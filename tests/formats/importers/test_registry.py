"""Import of third-party files to annotations and groups."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data
from bpo.formats.convert import convert
from bpo.formats.files import iterate_annotations, read_annotations, read_groups
from bpo.formats.image_folder import ImageFolder
from bpo.formats.importers.registry import open_source
from bpo.formats.reading import SeenIds
from bpo.records import Completion, ContentPart, Turn

IMAGE = ContentPart("image")


def text(value: str) -> ContentPart:
    return ContentPart("text", value)


def user(*content: ContentPart) -> Turn:
    return Turn("user", content)


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_json(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(list(records)))
    return path


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pair(chosen: str = "A bus.", rejected: str = "A tram.") -> tuple[Completion, Completion]:
    return Completion(chosen, 1.0, "chosen"), Completion(rejected, 0.0, "rejected")


# Annotations


def test_sharegpt_messages_with_a_system_prompt_and_several_images(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image> or <image>?"},
            {"role": "assistant", "content": "The first."},
        ],
        "images": ["a.png", "b.png"],
        "system": "Be brief.",
        "tools": "",
    }
    (annotation,) = read_annotations(write_json(tmp_path / "a.json", record)).annotations
    assert annotation.prompt == (Turn("system", (text("Be brief."),)), user(IMAGE, text(" or "), IMAGE, text("?")))
    assert (annotation.id, annotation.images, annotation.response) == ("record-0", ("a.png", "b.png"), "The first.")
    assert annotation.extra == {"tools": ""}


def test_coco_captions_find_their_images_in_either_order(tmp_path: Path) -> None:
    images = [{"id": 9, "file_name": "nine.jpg", "height": 4}, {"id": 4, "file_name": "four.jpg"}]
    captions = [
        {"id": 70, "image_id": 4, "caption": "A bus.\n"},
        {"id": 71, "image_id": 5, "caption": "Nobody's."},
        {"id": 72, "image_id": 9, "caption": "A tram."},
    ]
    for order in (("images", "annotations"), ("annotations", "images")):
        tree = {"info": {"year": 2014}, "licenses": [{"id": 1}], "images": images, "annotations": captions}
        path = tmp_path / "captions.json"
        path.write_text(json.dumps({key: tree[key] for key in ("info", "licenses", *order)}))
        bad = BadRecords("quarantine")
        first, second = read_annotations(path, bad).annotations
        assert (first.id, first.images, first.response) == ("70", ("four.jpg",), "A bus.")
        assert first.prompt == (user(IMAGE, text("Describe this image.")),)
        assert (second.images, second.extra) == (("nine.jpg",), {"image_id": 9})
        assert [(p.code, "image has the id 5" in p.detail) for p in bad.problems] == [("missing-field", True)]


def test_a_truncated_captions_file_is_reported_and_intact_captions_are_read(tmp_path: Path) -> None:
    captions = [{"id": n, "image_id": 1, "caption": f"A bus {n}."} for n in range(3)]
    text = json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": captions})
    (tmp_path / "torn.json").write_text(text[:-20])
    bad = BadRecords("quarantine")
    with pytest.raises(ValueError, match="torn.json: not JSON"):
        read_annotations(tmp_path / "torn.json", bad)
    (tmp_path / "bad.json").write_text(text.replace('"A bus 1."', "A bus 1."))
    assert [a.id for a in read_annotations(tmp_path / "bad.json", bad).annotations] == ["0", "2"]
    assert [p.code for p in bad.problems] == ["not-json"]


def test_a_table_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"')
    with pytest.raises(ValueError, match="a.csv: the header is unreadable"):
        read_annotations(tmp_path / "a.csv")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_tables_with_headings(tmp_path: Path, name: str, separator: str) -> None:
    rows = [
        ["id", "file_name", "question", "answer", "source"],
        ["1", "a.png", "What is <image>?", '"A bus,\nred."', "web"],
        ["2", "b.png", "", "A tram.", ""],
        ["3", "c.png", "What?", "", "web"],
        ["4", "d.png", "one cell too many", "x", "y", "z"],
        ["5", "e.png", "What?", "The last.", ""],
    ]
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(separator.join(row) for row in rows).encode() + b"\r\n\r\n")
    bad = BadRecords("quarantine")
    file = read_annotations(path, bad)
    one, two, five = file.annotations
    assert one.prompt == (user(IMAGE, text("What is ?")),)
    assert (one.response, one.extra) == ("A bus,\nred.", {"source": "web"})
    assert (two.prompt[0].text, two.extra, five.id) == ("Describe this image.", {}, "5")
    assert file.skipped == {"no answer": ("3",)}
    assert [(p.code, p.where) for p in bad.problems] == [("wrong-columns", f"{path}, line 6")]


def test_a_cell_that_is_not_utf8_invalidates_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"image,caption\na.png,caf\xe9\nb.png,a bus\n")
    bad = BadRecords("quarantine")
    assert [a.images for a in read_annotations(path, bad).annotations] == [("b.png",)]
    assert [p.code for p in bad.problems] == ["invalid-utf8"]


# Preferences


def test_rlaif_v_and_rlhf_v(tmp_path: Path) -> None:
    common = {"image": "a.jpg", "ds_name": "x", "origin_dataset": "COCO", "idx": 7, "image_path": "coco/a.jpg"}
    answers = {"question": "What?", "chosen": "A bus.", "rejected": "A tram."}
    for name, record in (("rlaif.json", common | answers), ("rlhf.json", common | {"text": json.dumps(answers)})):
        (group,) = read_groups(write_json(tmp_path / name, record))
        assert (group.id, group.images, group.completions) == ("7", ("a.jpg",), pair())
        assert group.prompt == (user(IMAGE, text("What?")),)
        assert group.extra == {"ds_name": "x", "origin_dataset": "COCO", "image_path": "coco/a.jpg"}


def test_sharegpt_with_two_answers(tmp_path: Path) -> None:
    record = {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "A bus."},
        "rejected": {"from": "gpt", "value": "A tram."},
        "images": ["a.png"],
    }
    (group,) = read_groups(write_json(tmp_path / "a.json", record))
    assert (group.images, group.prompt, group.completions) == (("a.png",), (user(IMAGE, text("What?")),), pair())


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What?", "chosen": "A bus.", "rejected": "A tram.", "images": ["a.png"]},
        {
            "prompt": [{"role": "user", "content": "What?"}],
            "chosen": [{"role": "assistant", "content": "A bus."}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A tram."}]}],
            "image": "a.png",
        },
        {
            "chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bus."}],
            "rejected": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A tram."}],
            "images": ["a.png"],
        },
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}
            ],
            "chosen": "A bus.",
            "rejected": "A tram.",
            "images": ["a.png"],
        },
    ],
)
def test_trl_formats_of_a_pair(tmp_path: Path, record: dict[str, Any]) -> None:
    (group,) = read_groups(write_lines(tmp_path / "a.jsonl", record))
    assert (group.images, group.prompt, group.completions) == (("a.png",), (user(IMAGE, text("What?")),), pair())


def test_answers_to_different_prompts_are_refused(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "x"}] for q in ("One?", "Two?")]
    with pytest.raises(ValueError, match="differ from turn 0 on"):
        read_groups(write_lines(tmp_path / "a.jsonl", {"chosen": turns[0], "rejected": turns[1]}))


def test_rows_of_one_group_must_be_adjacent(tmp_path: Path) -> None:
    completions = [{"response": r, "score": s, "type": "t"} for r, s in (("a", 2), ("b", 1), ("c", 0))]
    groups = [{"id": n, "images": ["a.png"], "prompt": n, "completions": completions} for n in ("x", "y")]
    convert(write_lines(tmp_path / "g.jsonl", *groups), tmp_path / "trl.jsonl", target="trl")
    rows = [json.loads(row) for row in (tmp_path / "trl.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and len(read_groups(tmp_path / "trl.jsonl")) == 2
    for broken in ([rows[0], rows[3], *rows[1:3], *rows[4:]], rows[:1] + rows[3:]):
        bad = BadRecords("quarantine")
        path = write_lines(tmp_path / "broken.jsonl", *broken)
        assert all(group.id in ("x", "y") for group in read_groups(path, bad))
        assert {p.code for p in bad.problems} == {"rows-apart"}
        assert check_data(path, opens_images=False).counts == {"rows-apart": len(bad.problems)}
    changed = rows[1] | {"prompt": [{"role": "user", "content": "Another?"}]}
    with pytest.raises(ValueError, match="differ in prompt"):
        read_groups(write_lines(tmp_path / "b.jsonl", rows[0], changed, rows[2]))


# Shards


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset_shards_with_captions_and_with_conversations(tmp_path: Path) -> None:
    conversation = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]}
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(
        shards / "0.tar", ("x/1.png", png(1)), ("x/1.txt", b"A bus."), ("x/2.txt", b"A tram."), ("x/2.png", png(2))
    )
    write_tar(shards / "1.tar", ("x/3.png", png(3)), ("x/3.txt", b"A car."))
    result = convert(shards, tmp_path / "a.jsonl", images=ImageFolder(tmp_path / "images"))
    annotations = read_annotations(tmp_path / "a.jsonl").annotations
    assert [(a.id, a.images, a.response) for a in annotations] == [
        ("x/1", ("x/1.png",), "A bus."),
        ("x/2", ("x/2.png",), "A tram."),
        ("x/3", ("x/3.png",), "A car."),
    ]
    assert (tmp_path / "images/x/2.png").read_bytes() == png(2) and result.num_images == 3
    write_tar(
        tmp_path / "c.tar", ("a.json", json.dumps(conversation | {"image": "coco/a.png"}).encode()), ("a.png", png())
    )
    convert(tmp_path / "c.tar", tmp_path / "c.jsonl", images=ImageFolder(tmp_path / "other"))
    (annotation,) = read_annotations(tmp_path / "c.jsonl").annotations
    assert annotation.images == ("coco/a.png",) and (tmp_path / "other/coco/a.png").exists()


def test_damage_in_a_shard_invalidates_only_its_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        ("1.png", png()),
        ("1.txt", b"caf\xe9"),
        ("2.png", b"no picture"),
        ("2.txt", b"A tram."),
        ("3.json", b"{"),
        ("3.png", png()),
        ("4.png", png()),
        ("4.txt", b"A bus."),
    )
    result = check_data(path)
    assert result.counts == {"invalid-utf8": 1, "image-undecodable": 1, "not-json": 1}
    bad = BadRecords("quarantine")
    convert(path, tmp_path / "a.jsonl", images=ImageFolder(tmp_path / "images"), bad=bad)
    assert [a.id for a in read_annotations(tmp_path / "a.jsonl").annotations] == ["4"]
    assert [p.code for p in bad.problems] == ["invalid-utf8", "image-undecodable", "not-json"]
    whole = path.read_bytes()
    path.write_bytes(whole[:4700])
    assert check_data(path, opens_images=False).counts["torn-record"] == 1


def test_names_in_a_shard_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path)
    names = ("../1.png", "/2.png", "link/3.png")
    members = [m for n in names for m in ((n, png(len(n))), (n.replace(".png", ".txt"), b"A bus."))]
    convert(write_tar(tmp_path / "a.tar", *members), tmp_path / "a.jsonl", images=ImageFolder(tmp_path / "images"))
    annotations = read_annotations(tmp_path / "a.jsonl").annotations
    assert all((tmp_path / "images" / a.images[0]).parent == tmp_path / "images" for a in annotations)
    assert not (tmp_path / "1.png").exists() and not (tmp_path / "3.png").exists() and len(annotations) == 3


def test_an_embedded_image_needs_a_folder(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("1.png", png()), ("1.txt", b"A bus."))
    with pytest.raises(ValueError, match="contains an image; extract it to a folder with `bpo convert`"):
        read_annotations(path)
    with pytest.raises(ValueError, match="set a folder with --images"):
        convert(path, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("image", [{"bytes": 5, "path": "a.png"}, {"bytes": None, "path": None}, {"path": 7}])
def test_an_image_that_is_neither_bytes_nor_a_path_is_refused(tmp_path: Path, image: dict[str, Any]) -> None:
    record = {"prompt": "What?", "chosen": "A bus.", "rejected": "A tram.", "images": [image]}
    path = write_lines(tmp_path / "a.jsonl", record)
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        convert(path, tmp_path / "out.jsonl", images=ImageFolder(tmp_path / "images"))


def test_a_table_with_semicolons_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffimage;question;answer\r\na.png;"A; or B?";Größe 1,5\r\n'.encode())
    (annotation,) = read_annotations(tmp_path / "a.csv").annotations
    assert (annotation.prompt[0].text, annotation.response) == ("A; or B?", "Größe 1,5")
    (tmp_path / "a.csv").write_text("image,question;answer\na.png,What?\n")
    with pytest.raises(ValueError, match=r"fields \['image', 'question;answer'\] match no supported format"):
        read_annotations(tmp_path / "a.csv")


# Size


def test_ids_are_distinguished_in_a_growing_table() -> None:
    seen = SeenIds()
    assert all(seen.add(f"id-{n}") for n in range(5000))
    assert not any(seen.add(f"id-{n}") for n in range(5000))
    assert [seen.unused("id-7") for _ in range(3)] == ["id-7#2", "id-7#3", "id-7#4"]


def test_annotations_are_streamed_in_bounded_memory(tmp_path: Path) -> None:
    conversation = [{"from": "human", "value": "What? " * 50}, {"from": "gpt", "value": "A bus. " * 200}]
    peaks = []
    for num_records in (1000, 8000):
        path = tmp_path / f"{num_records}.json"
        record = json.dumps({"image": "a.png", "conversations": conversation})
        path.write_text("[" + ",\n".join([record] * num_records) + "]")
        tracemalloc.start()
        assert sum(1 for _ in iterate_annotations(path)) == num_records
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 10e6
    # For 8 times the records, memory may grow by a table of ids and a file chunk, not by the 12 MB of text.
    assert peaks[1] - peaks[0] < 2e6


def test_the_schema_of_a_record_is_found(tmp_path: Path) -> None:
    records = {
        "rlaif-v": {"question": "", "chosen": "", "rejected": "", "image": ""},
        "trl": {"prompt": "", "chosen": "", "rejected": ""},
        "paper": {"prompt": "", "completions": [], "image": ""},
        "annotations": {"prompt": [], "response": "", "images": []},
        "llava": {"conversations": [], "image": ""},
        "table": {"image": "", "caption": ""},
        "sharegpt-pairs": {"messages": [], "chosen": {}, "rejected": {}},
        "ms-swift": {"messages": [], "rejected_response": ""},
        "vlfeedback": {"prompt": "", "completions": [{"response": "", "annotations": {}}]},
        "kto": {"messages": [], "label": True},
    }
    for name, record in records.items():
        schema = open_source(write_json(tmp_path / "a.json", 5, record)).schema
        assert schema is not None and schema.name == name
