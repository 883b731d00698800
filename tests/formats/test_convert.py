"""Conversions are lossless and write files atomically."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bpo.cli import main
from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data
from bpo.formats.convert import convert
from bpo.formats.embedded import OTHER_COLUMN
from bpo.formats.exporters import group_to_paper, trl_rows
from bpo.formats.fields import RECORD_KEYS
from bpo.formats.files import group_to_json, read_annotations, read_groups
from bpo.formats.image_folder import ImageFolder
from bpo.formats.importers.preferences import PairRow, group_from_trl, merge_rows
from bpo.formats.problems import RecordError
from bpo.formats.schema import COMPLETION_KEYS, group_from_json, group_from_paper
from bpo.records import Auxiliary, Completion, ContentPart, PreferenceGroup, Provenance, Turn
from tests.conftest import FUZZ

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<image>", " <image>\n", "\n"]
)
ANSWERS = TEXTS.filter(lambda value: bool(value.strip()))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
EXTRAS = st.dictionaries(TEXTS, JSON_VALUES, max_size=2)
COMPLETIONS = st.builds(
    Completion,
    ANSWERS,
    st.floats(allow_nan=False, allow_infinity=False),
    ANSWERS,
    st.none() | st.builds(Provenance, ANSWERS, seed=st.none() | st.integers()),
    EXTRAS.map(lambda extra: {k: v for k, v in extra.items() if k not in COMPLETION_KEYS}),
    st.sampled_from([1.0, 0.0, 0.25, 1e6]),
    st.sampled_from([1.0, 0.25, 1e6]),
    st.sampled_from([(), ((0, 1, 0.0),), ((0, 1, 2.5),)]),
)
PARTS = st.just(ContentPart("image")) | TEXTS.map(lambda text: ContentPart("text", text))


@st.composite
def groups(draw: Any) -> PreferenceGroup:
    turns = draw(
        st.lists(st.builds(Turn, st.sampled_from(["user", "assistant", "system"]), st.lists(PARTS).map(tuple)))
    )
    turns.append(Turn("user", (ContentPart("image"), *draw(st.lists(PARTS, max_size=3)))))
    if draw(st.booleans()):
        turns.append(Turn("assistant", (ContentPart("text", draw(ANSWERS)),)))
    images = tuple(f"{n}.png" for n in range(sum(turn.num_images for turn in turns)))
    completions = draw(st.lists(COMPLETIONS, min_size=2, max_size=4))
    extra = {k: v for k, v in draw(EXTRAS).items() if k not in RECORD_KEYS}
    others = tuple(f"other-{image}" for image in images) if draw(st.booleans()) else ()
    if others:
        completions = [replace(completion, view=draw(st.sampled_from(["", "other"]))) for completion in completions]
    asked = Turn("user", tuple(ContentPart("image") for _ in images))
    auxiliary = draw(st.lists(ANSWERS.map(lambda answer: Auxiliary((asked,), answer)), max_size=2))
    return PreferenceGroup(draw(ANSWERS), images, tuple(turns), tuple(completions), extra, others, tuple(auxiliary))


@given(groups())
@settings(max_examples=150 * FUZZ, deadline=None)
def test_a_group_survives_bpo_paper_and_trl_formats(group: PreferenceGroup) -> None:
    def through_json(tree: Any) -> Any:
        return json.loads(json.dumps(tree))

    assert group_from_json(through_json(group_to_json(group)), "here") == group
    assert group_from_paper(through_json(group_to_paper(group)), group.id, "here") == group
    if len({completion.score for completion in group.completions if not completion.view}) > 1:
        images = {"images": list(group.images), OTHER_COLUMN: list(group.other_images)}
        rows = [through_json({**row, **images}) for row in trl_rows(group)]
        pairs = [group_from_trl(row, "x", "here") for row in rows]
        assert merge_rows([pair for pair in pairs if isinstance(pair, PairRow)], "here") == group


def test_a_plain_group_is_written_in_the_papers_format() -> None:
    prompt = (Turn("user", (ContentPart("image"), ContentPart("text", "What is this?"))),)
    group = PreferenceGroup(
        "7", ("coco/a.jpg",), prompt, (Completion("A bus.", 1, "gt"), Completion("A tram.", 0, "hal"))
    )
    assert group_to_paper(group) == {
        "id": "7",
        "image": "coco/a.jpg",
        "prompt": "<image>\nWhat is this?",
        "completions": [
            {"response": "A bus.", "score": 1, "type": "gt"},
            {"response": "A tram.", "score": 0, "type": "hal"},
        ],
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in range(3):
        Image.new("RGB", (4, 4), (number * 60, 0, 0)).save(tmp_path / f"{number}.png")
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "A street."},
        {"role": "user", "content": [{"type": "text", "text": "And <image> what drives there?"}]},
    ]
    completions = [
        {"response": "A bus.", "score": 1, "type": "gt", "annotator": {"id": 7}},
        {"response": "A tram.", "score": 0.25, "type": "mllm-hal", "provenance": {"source": "weaken", "seed": 3}},
        {"response": "A lorry.", "score": 0, "type": "llm-hal", "weight": 0.5},
    ]
    with (tmp_path / "groups.jsonl").open("w") as file:
        for number in range(3):
            prompt = turns if number else "What <image> is this?"
            group = {"id": f"g{number}", "images": [f"{number}.png"], "prompt": prompt, "completions": completions}
            file.write(json.dumps(group | {"split": ["train", None]}) + "\n")
    return tmp_path


@pytest.mark.parametrize(("name", "target"), [("p.json", None), ("t.jsonl", "trl"), ("g.jsonl", None)])
def test_files_survive_the_round_trip(files: Path, name: str, target: Any) -> None:
    convert(files / "groups.jsonl", files / name, target=target)
    assert read_groups(files / name) == read_groups(files / "groups.jsonl")
    convert(files / name, files / "back.jsonl")
    assert read_groups(files / "back.jsonl") == read_groups(files / "groups.jsonl")


def test_parquet_with_images_survives_the_round_trip(files: Path) -> None:
    result = convert(files / "groups.jsonl", files / "t.parquet", image_root=files)
    assert (result.num_read, result.num_written) == (3, 9)
    convert(files / "t.parquet", files / "back.jsonl", images=ImageFolder(files / "images"))
    assert read_groups(files / "back.jsonl") == read_groups(files / "groups.jsonl")
    for number in range(3):
        assert (files / "images" / f"{number}.png").read_bytes() == (files / f"{number}.png").read_bytes()


def test_datasets_decodes_the_images_of_the_parquet_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", files / "cache")
    convert(files / "groups.jsonl", files / "t.parquet", image_root=files)
    rows = datasets.Dataset.from_parquet(str(files / "t.parquet"), cache_dir=str(files / "cache"))
    assert rows[3]["images"][0].getpixel((0, 0)) == (60, 0, 0)
    assert rows[0]["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]
    assert [part["type"] for part in rows[3]["prompt"][1]["content"]] == ["text", "image", "text"]


def test_trl_accepts_the_rows_and_places_each_image(files: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils", reason="needs trl: pip install 'bpo[bench]'")
    convert(files / "groups.jsonl", files / "t.parquet", image_root=files)
    row = datasets.Dataset.from_parquet(str(files / "t.parquet"), cache_dir=str(files / "cache"))[3]
    assert data_utils.is_conversational(row)
    turns = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
    assert [part["type"] for part in turns[1]["content"]] == ["text", "image", "text"]
    assert turns[1]["content"][1]["image"].getpixel((0, 0)) == (60, 0, 0)
    assert data_utils.prepare_multimodal_messages(row["chosen"])[0]["content"][0]["text"] == "A bus."


def test_damaged_parquet_is_refused(files: Path) -> None:
    convert(files / "groups.jsonl", files / "t.parquet", image_root=files)
    (files / "t.parquet").write_bytes((files / "t.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged parquet file"):
        read_groups(files / "t.parquet")


def test_absolute_paths_become_relative_with_image_root(files: Path) -> None:
    whole = (files / "groups.jsonl").read_text().replace('"images": ["', f'"images": ["{files}/')
    (files / "absolute.jsonl").write_text(whole)
    convert(files / "absolute.jsonl", files / "same.json")
    assert read_groups(files / "same.json") == read_groups(files / "absolute.jsonl")
    convert(files / "absolute.jsonl", files / "moved.jsonl", image_root=files)
    assert read_groups(files / "moved.jsonl") == read_groups(files / "groups.jsonl")
    convert(files / "absolute.jsonl", files / "t.parquet", image_root=files)
    convert(files / "t.parquet", files / "back.jsonl", images=ImageFolder(files / "images"))
    assert read_groups(files / "back.jsonl") == read_groups(files / "groups.jsonl")


def test_annotations_survive_and_convert_only_to_bpo(files: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    record = {"id": 5, "image": "0.png", "conversations": turns, "response": "kept apart", "split": "train"}
    (files / "a.json").write_text(
        json.dumps([record, record | {"image": None, "conversations": [{"from": "human", "value": "What?"}, turns[1]]}])
    )
    result = convert(files / "a.json", files / "a.jsonl")
    assert result.left_out == {"text only": 1}
    assert read_annotations(files / "a.jsonl").annotations == read_annotations(files / "a.json").annotations
    assert read_annotations(files / "a.jsonl").annotations[0].extra == {
        "split": "train",
        "source_response": "kept apart",
    }
    with pytest.raises(ValueError, match="contains annotations .* run bpo bootstrap first"):
        convert(files / "a.json", files / "t.json")


def test_an_error_leaves_no_half_written_file(files: Path) -> None:
    with (files / "groups.jsonl").open("a") as file:
        file.write("{torn")
    with pytest.raises(ValueError, match="line 4"):
        convert(files / "groups.jsonl", files / "out.json")
    assert sorted(path.name for path in files.iterdir() if "out" in path.name) == []
    bad = BadRecords("quarantine", max_bad_share=0.2)
    with pytest.raises(ValueError, match="1 of 4 records are bad"):
        convert(files / "groups.jsonl", files / "out.json", bad=bad)
    assert not (files / "out.json").exists()


def test_the_command_lists_what_it_left_out(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (files / "groups.jsonl").open("a") as file:
        file.write("{torn")
    arguments = ["--on-bad", "quarantine", "--max-bad-share", "0.5"]
    assert main(["convert", str(files / "groups.jsonl"), str(files / "out.json"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "3 rows from 3 records" in printed and "bad: 1" in printed
    (entry,) = map(json.loads, (files / "out.json.quarantine.jsonl").read_text().splitlines())
    assert entry["code"] == "torn-record" and entry["where"].endswith("line 4")
    assert main(["convert", str(files / "groups.jsonl"), str(files / "groups.jsonl")]) == 1
    assert "is the input" in capsys.readouterr().err
    assert main(["convert", str(files / "groups.jsonl"), str(files / "out.xml")]) == 1
    assert "or set the format with --to" in capsys.readouterr().err


@pytest.fixture
def server() -> Iterator[str]:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 0, 0)).save(buffer, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(buffer.getvalue() if found else b"")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as image_server:
        threading.Thread(target=image_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{image_server.server_port}"
        image_server.shutdown()


def test_urls_are_fetched_only_if_allowed(files: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"{server}/{name}.png", "caption": "A bus."} for name in ("a", "missing")]
    (files / "a.json").write_text(json.dumps(rows))
    convert(files / "a.json", files / "plain.jsonl", images=ImageFolder(files / "images"))
    assert read_annotations(files / "plain.jsonl").annotations[0].images == (f"{server}/a.png",)
    assert not (files / "images").exists()
    with pytest.raises(ValueError, match="'127.0.0.1' is 127.0.0.1, which is not a public address"):
        convert(files / "a.json", files / "a.jsonl", images=ImageFolder(files / "images", fetches_urls=True))
    monkeypatch.setattr("bpo.formats.download.is_public", lambda address: True)
    bad = BadRecords("quarantine")
    convert(files / "a.json", files / "a.jsonl", images=ImageFolder(files / "images", fetches_urls=True), bad=bad)
    (annotation,) = read_annotations(files / "a.jsonl").annotations
    assert Image.open(files / "images" / annotation.images[0]).getpixel((0, 0)) == (9, 0, 0)
    assert [p.code for p in bad.problems] == ["image-url"] and "404" in bad.problems[0].detail


def _base64() -> str:
    buffer = io.BytesIO()
    Image.effect_noise((9, 9), 60).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PNG = _base64()


@pytest.mark.parametrize(
    "image",
    [
        f"data:image/png;base64,{PNG}",
        f"data:image/png;charset=utf-8;base64,{PNG.rstrip('=')}",
        PNG,
        f"{PNG[:76]}\n{PNG[76:]}\n",
        PNG.replace("+", "-").replace("/", "_"),
        {"bytes": PNG, "path": None},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"url": f"data:image/png;base64,{PNG}"},
        "file://{root}/p%200.png",
        "file://localhost{root}/p%200.png",
        {"path": "{root}/p 0.png", "bytes": None},
        {"type": "image", "image": "file://{root}/p%200.png"},
        {"url": "p 0.png"},
    ],
)
@pytest.mark.parametrize("field", ["image", "images", "img_path", "nested"])
def test_convert_writes_images_of_every_transport(tmp_path: Path, image: Any, field: str) -> None:
    (tmp_path / "p 0.png").write_bytes(base64.b64decode(PNG))
    image = json.loads(json.dumps(image).replace("{root}", str(tmp_path)))
    name, value = ("images", [[image]]) if field == "nested" else (field, [image] if field == "images" else image)
    row = {"prompt": "What?", "chosen": "A bus.", "rejected": "A tram.", name: value}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert check_data(tmp_path / "a.jsonl", image_root=tmp_path).counts == {}
    convert(tmp_path / "a.jsonl", tmp_path / "g.jsonl", images=ImageFolder(tmp_path), image_root=tmp_path)
    (group,) = read_groups(tmp_path / "g.jsonl")
    assert (tmp_path / group.images[0]).read_bytes() == base64.b64decode(PNG)
    assert check_data(tmp_path / "g.jsonl", image_root=tmp_path).num_trained == 1


@pytest.mark.parametrize(
    ("image", "images"),
    [
        ([["a.png", "b.png"]], ("a.png", "b.png")),
        ('["a.png", "b.png"]', ("a.png", "b.png")),
        ({"<image_00>": "a.png", "<image_01>": "b.png"}, ("a.png", "b.png")),
        ({"<image_01>": "a.png", "<image_00>": "b.png"}, ("b.png", "a.png")),
    ],
)
def test_images_in_other_lists_are_read_in_their_order(tmp_path: Path, image: Any, images: tuple[str, ...]) -> None:
    marks = "<image_00> or <image_01>" if isinstance(image, dict) else "<image> or <image>"
    turns = [{"role": "user", "content": f"{marks}?"}, {"role": "assistant", "content": "The first."}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": image, "conversations": turns}]))
    (annotation,) = read_annotations(tmp_path / "a.json").annotations
    assert annotation.images == images
    assert [part.type for part in annotation.prompt[0].content] == ["image", "text", "image", "text"]
    assert annotation.prompt[0].text.replace(" ", "") == "or?"


def test_other_schemes_are_not_fetched(files: Path) -> None:
    (files / "a.json").write_text(json.dumps([{"image": "s3://bucket/a.png", "caption": "A bus."}]))
    with pytest.raises(RecordError, match="a storage that bpo does not read .s3://") as refused:
        convert(files / "a.json", files / "a.jsonl", images=ImageFolder(files / "images", fetches_urls=True))
    assert refused.value.code == "image-scheme"
    assert check_data(files / "a.json", image_root=files).counts == {"image-scheme": 1}
