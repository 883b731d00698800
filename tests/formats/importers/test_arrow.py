"""Import of data written by the package `datasets`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from bpo.cli import main
from bpo.formats.check import check_data
from bpo.formats.convert import convert
from bpo.formats.files import read_annotations, read_groups
from bpo.formats.image_folder import ImageFolder

PAIR = {"prompt": "What?", "chosen": "A bus.", "rejected": "A tram."}
TEXTS = {name: datasets.Value("string") for name in PAIR}
ANSWERS = ("A bus.", "A tram.")


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))


def photos(root: Path) -> datasets.Dataset:
    """Three pairs, each with a list of one image path."""
    rows = [PAIR | {"images": [str(root / "photos" / f"{n}.png")]} for n in range(3)]
    features = datasets.Features(**TEXTS, images=datasets.List(datasets.Image()))
    return datasets.Dataset.from_list(rows, features=features)


def test_a_saved_dataset_is_read_with_its_images(tmp_path: Path) -> None:
    photos(tmp_path).save_to_disk(tmp_path / "saved", num_shards=2)
    assert check_data(tmp_path / "saved").counts == {}
    result = convert(tmp_path / "saved", tmp_path / "g.jsonl", images=ImageFolder(tmp_path / "images"))
    groups = read_groups(tmp_path / "g.jsonl")
    assert (result.num_read, result.num_images) == (3, 3)
    assert [group.images for group in groups] == [("0.png",), ("1.png",), ("2.png",)]
    assert all(tuple(c.response for c in group.completions) == ANSWERS for group in groups)
    assert (tmp_path / "images/2.png").read_bytes() == png(2)


def test_a_saved_dictionary_needs_a_split(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=photos(tmp_path), test=photos(tmp_path).select([0]))
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="both: a saved dataset with the splits test, train; choose one, such as"):
        check_data(tmp_path / "both")
    assert check_data(tmp_path / "both" / "train").num_records == 3
    datasets.DatasetDict(train=photos(tmp_path)).save_to_disk(tmp_path / "one")
    assert check_data(tmp_path / "one").num_records == 3


@pytest.mark.parametrize("damage", ["state.json", "data-00000-of-00001.arrow", None])
def test_a_damaged_dataset_is_refused(tmp_path: Path, damage: str | None) -> None:
    photos(tmp_path).save_to_disk(tmp_path / "saved")
    if damage is None:
        (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    else:
        (tmp_path / "saved" / damage).write_bytes((tmp_path / "saved" / damage).read_bytes()[:20])
    with pytest.raises(ValueError, match="saved is a damaged dataset"):
        check_data(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "feature", "value"),
    [
        ("image", datasets.Image(), {"bytes": png(7), "path": "a.png"}),
        ("image", datasets.Image(decode=False), {"bytes": png(7), "path": None}),
        ("image", datasets.Value("binary"), png(7)),
        ("images", datasets.List(datasets.Image()), [{"bytes": png(7), "path": None}]),
        ("images", datasets.Image(), {"bytes": png(7), "path": "../a.png"}),
    ],
)
@pytest.mark.parametrize("saves", [True, False])
def test_every_shape_of_an_image_column(tmp_path: Path, name: str, feature: Any, value: Any, saves: bool) -> None:
    table = datasets.Dataset.from_list(
        [{name: value, "caption": "A bus."}],
        features=datasets.Features({name: feature, "caption": datasets.Value("string")}),
    )
    path = tmp_path / ("saved" if saves else "a.parquet")
    table.save_to_disk(path) if saves else table.to_parquet(path)
    assert check_data(path).counts == {}
    convert(path, tmp_path / "a.jsonl", images=ImageFolder(tmp_path / "images"))
    (annotation,) = read_annotations(tmp_path / "a.jsonl").annotations
    assert (tmp_path / "images" / annotation.images[0]).read_bytes() == png(7)


def test_images_given_only_by_path_must_be_below_the_root(tmp_path: Path) -> None:
    # `to_parquet` writes {"bytes": null, "path": "/..."} for them.
    photos(tmp_path).to_parquet(tmp_path / "p.parquet")
    assert check_data(tmp_path / "p.parquet", image_root=tmp_path).counts == {}
    assert check_data(tmp_path / "p.parquet", image_root=tmp_path / "cache").counts == {"image-absolute": 3}
    assert [g.images for g in read_groups(tmp_path / "p.parquet")] == [
        (f"{tmp_path}/photos/{n}.png",) for n in range(3)
    ]
    (tmp_path / "photos" / "1.png").write_bytes(b"")
    assert check_data(tmp_path / "p.parquet", image_root=tmp_path).counts == {"image-empty": 1}


def test_rows_are_streamed_from_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "repository"
    for split in ("train", "test"):
        (repository / split).mkdir(parents=True)
        row = PAIR | {"prompt": f"What {split}?", "images": [{"bytes": png(1), "path": "a.png"}]}
        datasets.Dataset.from_list(
            [row], features=datasets.Features(**TEXTS, images=datasets.List(datasets.Image()))
        ).to_parquet(repository / split / "0.parquet")
    arguments = ["convert", f"hub:{repository}:test", str(tmp_path / "g.jsonl"), "--images", str(tmp_path / "images")]
    assert main(arguments) == 0
    (group,) = read_groups(tmp_path / "g.jsonl")
    assert group.prompt[0].text == "What test?" and (tmp_path / "images" / group.images[0]).read_bytes() == png(1)
    for name, message in (
        (f"{repository}", f"has the splits train, test; choose one: hub:{repository}:train"),
        (f"{repository}:val", "cannot be loaded (ValueError: Bad split: val"),
        ("an-owner/nothing", "check name, split and network"),
    ):
        assert main(["convert", f"hub:{name}", str(tmp_path / "x.jsonl")]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="bpo convert hub:an-owner/nothing FILE.jsonl"):
        read_groups(Path("hub:an-owner/nothing"))


def test_a_missing_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for path in (tmp_path / "saved", Path("hub:an-owner/nothing")):
        with pytest.raises(ValueError, match=r"requires the package datasets; pip install 'bpo\[hub\]'"):
            check_data(path)


def test_tables_from_other_writers(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    words = pyarrow.array(["A bus.", None, "A bus."], pyarrow.large_string()).dictionary_encode()
    prompts = pyarrow.array([[{"role": "user", "content": "What?", "name": None}]] * 3)
    columns = {"chosen": words, "rejected": ["A tram."] * 3, "prompt": prompts, "images": [["0.png"]] * 3}
    days = pyarrow.array([0, 1, None], pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table(columns | {"day": days}), tmp_path / "a.parquet")
    result = check_data(tmp_path / "a.parquet", image_root=tmp_path / "photos")
    assert result.counts == {"missing-field": 1, "unknown-field": 1} and result.num_records == 3
    convert_bad = tmp_path / "a.jsonl"
    arguments = ["convert", str(tmp_path / "a.parquet"), str(convert_bad), "--on-bad", "quarantine"]
    assert main([*arguments, "--max-bad-share", "0.5"]) == 0
    assert [json.loads(line).get("day") for line in convert_bad.read_text().splitlines()] == ["1970-01-01", None]


def test_turns_in_columns_and_numbered_images(tmp_path: Path) -> None:
    # The format of a Sequence of objects in `datasets` < 4, and of parts in HuggingFaceH4's llava-instruct-mix-vsft.
    turns = {"from": ["human", "gpt"], "value": ["<image>What?", "A bus."]}
    datasets.Dataset.from_list([{"image": "a.png", "conversations": turns}]).to_parquet(tmp_path / "a.parquet")
    (annotation,) = read_annotations(tmp_path / "a.parquet").annotations
    assert (annotation.prompt[0].text, annotation.response, annotation.extra) == ("What?", "A bus.", {})

    def message(role: str, *parts: tuple[str, int | None, str | None]) -> dict[str, Any]:
        return {"role": role, "content": [{"type": t, "index": i, "text": x} for t, i, x in parts]}

    def write(*numbers: int) -> Path:
        asked = message("user", *(("image", number, None) for number in numbers), ("text", None, "Which?"))
        row = {"messages": [asked, message("assistant", ("text", None, "It."))], "images": ["a.png", "b.png"]}
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "b.parquet")
        return tmp_path / "b.parquet"

    (annotation,) = read_annotations(write(0, 1)).annotations
    assert [part.type for part in annotation.prompt[0].content] == ["image", "image", "text"]
    with pytest.raises(ValueError, match="unknown key 'index'"):
        read_annotations(write(1, 0))
