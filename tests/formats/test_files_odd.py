"""Unusual input files: pandas indexes, macOS tar files, multi-line objects, pipes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from bpo.cli import main
from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data
from bpo.formats.convert import convert
from bpo.formats.files import read_annotations
from bpo.formats.image_folder import ImageFolder

CAPTION = json.dumps({"image": "a.png", "caption": "A bus."})


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json is not a regular file"):
        check_data(tmp_path / "a.json")


def test_an_object_over_several_lines_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(json.loads(CAPTION), indent=2))
    with pytest.raises(ValueError, match="a JSON object spans several lines"):
        check_data(tmp_path / "a.json")


def test_the_index_that_pandas_writes_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",image,caption\n0,a.png,A bus.\n")
    (annotation,) = read_annotations(tmp_path / "a.csv").annotations
    assert (annotation.images, annotation.extra) == (("a.png",), {"Unnamed: 0": "0"})
    (tmp_path / "b.csv").write_text("image,,caption\na.png,x,A bus.\n")
    with pytest.raises(ValueError, match="duplicate or empty names"):
        read_annotations(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("name", "strays", "num_bad"),
    [
        ("a.tsv", {3: '"a stray mark'}, 1),
        ("a.tsv", {3: '"a stray mark', 40: '"and another'}, 2),
        ("a.tsv", {3: '"a stray mark', 40: 'the end of a quotation"'}, 1),
        ("a.csv", {3: '"a stray mark', 40: 'the end of a quotation"'}, 1),
        ("a.csv", {3: '"he said "hi" to me"', 40: '"two\nlines, and a comma, two"'}, 1),
    ],
)
def test_an_unbalanced_quote_invalidates_only_its_line(
    tmp_path: Path, name: str, strays: dict[int, str], num_bad: int
) -> None:
    separator = "\t" if name.endswith("tsv") else ","
    rows = [f"{n}.png{separator}{strays.get(n, f'caption {n}')}" for n in range(100)]
    (tmp_path / name).write_text(f"image{separator}caption\n" + "\n".join(rows) + "\n")
    result = check_data(tmp_path / name, opens_images=False)
    assert (result.num_bad, result.num_records, dict(result.counts)) == (num_bad, 100, {"wrong-columns": num_bad})
    assert f"{tmp_path / name}, line 5: " in result.examples["wrong-columns"][0]
    kept = [a.images[0] for a in read_annotations(tmp_path / name, BadRecords("quarantine")).annotations]
    assert kept[:4] == ["0.png", "1.png", "2.png", "4.png"] and kept[-1] == "99.png"


def test_a_shard_from_macos_or_of_a_folder(tmp_path: Path) -> None:
    members = [("./._1.jpg", b"\0\5\26\7"), ("./1.JPG", png()), ("./._1.txt", b"\0\5"), ("./1.TXT", b"A bus.")]
    result = convert(
        write_tar(tmp_path / "a.tar", *members), tmp_path / "a.jsonl", images=ImageFolder(tmp_path / "images")
    )
    (annotation,) = read_annotations(tmp_path / "a.jsonl").annotations
    assert (annotation.id, annotation.images, annotation.response) == ("1", ("1.JPG",), "A bus.")
    assert result.left_out == {}


def test_links_and_devices_in_a_shard_invalidate_their_sample(tmp_path: Path) -> None:
    link, device, hard = tarfile.TarInfo("1.png"), tarfile.TarInfo("2.png"), tarfile.TarInfo("3.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    hard.type, hard.linkname = tarfile.LNKTYPE, "4.png"
    members = [link, ("1.txt", b"x"), device, ("2.txt", b"x"), hard, ("3.txt", b"x"), ("4.png", png()), ("4.txt", b"y")]
    path = write_tar(tmp_path / "a.tar", *members)
    assert check_data(path).counts == {"wrong-type": 3} and check_data(path).num_records == 4


@pytest.mark.timeout(20)
def test_a_member_with_a_false_size_of_a_terabyte_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("1.png")
    header.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf() + png() + bytes(1024))
    with pytest.raises(ValueError, match="sample '1': the shard is damaged"):
        read_annotations(tmp_path / "a.tar")
    whole = write_tar(tmp_path / "b.tar", ("0.png", png()), ("0.txt", b"A bus.")).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:2048] + (tmp_path / "a.tar").read_bytes())
    assert check_data(tmp_path / "c.tar").counts == {"torn-record": 1}


def test_conflicting_names_lose_no_image(tmp_path: Path) -> None:
    names = ["a", "a/b.png", "d/e.png", "d", ".", "..", "d/", "https://x/y.png", "n" * 300]
    members = []
    for number, name in enumerate(names):
        record = json.dumps({"image": name, "caption": "A bus."}).encode()
        members += [(f"{number}.json", record), (f"{number}.png", png(number))]
    path = write_tar(tmp_path / "a.tar", *members)
    result = convert(path, tmp_path / "a.jsonl", images=ImageFolder(tmp_path / "images"))
    images = [annotation.images[0] for annotation in read_annotations(tmp_path / "a.jsonl").annotations]
    assert [(tmp_path / "images" / image).read_bytes() for image in images] == [png(n) for n in range(len(names))]
    assert result.num_images == len(names) and images[::2][:2] == ["a", "d/e.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.tar", "images"]


@pytest.mark.parametrize("place", ["folder.jsonl", "file/out.jsonl"])
def test_an_unwritable_output_is_a_one_line_error(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "a.json").write_text(CAPTION)
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(tmp_path / "a.json"), str(tmp_path / place)]) == 1
    assert f"{tmp_path / place} cannot be written" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    report = ["check", str(tmp_path / "a.json"), "--no-images", "--json", str(tmp_path / place)]
    assert main(report) == 1 and "choose another path with --json" in capsys.readouterr().err
    listed = ["check", str(tmp_path / "a.json"), "--no-images", "--quarantine", str(tmp_path / "file" / "q.jsonl")]
    assert main(listed) == 1 and "choose another path with --quarantine" in capsys.readouterr().err
    shard = write_tar(tmp_path / "a.tar", ("1.png", png()), ("1.txt", b"A bus."))
    arguments = ["convert", str(shard), str(tmp_path / "b.jsonl"), "--images", str(tmp_path / "file")]
    assert main(arguments) == 1 and "choose another folder" in capsys.readouterr().err


def test_checking_the_current_folder_writes_the_list_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", ("1.png", png()), ("1.txt", b"A bus."))
    monkeypatch.chdir(tmp_path / "shards")
    assert main(["check", ".", "--workers", "1"]) == 0
    assert (tmp_path / "shards.quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("share", ["nan", "-0.1", "1.5", "some"])
@pytest.mark.parametrize("command", [["check", "a.json"], ["convert", "a.json", "b.jsonl"]])
def test_a_share_is_between_0_and_1(share: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--max-bad-share", share])
    assert f"'{share}' is not a fraction of records" in capsys.readouterr().err


def test_an_empty_list_of_images_next_to_an_image_is_ignored(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "images": [], "conversations": turns}]))
    assert read_annotations(tmp_path / "a.json").annotations[0].images == ("a.png",)
