"""Cache of measured lengths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data import encode, groups
from bpo.data.encode import Dropped, Encoder, load_encoder
from bpo.data.groups import GroupDataset
from bpo.data.lengths import Measured, MeasuredLengths, encoder_fingerprint, lengths_directory
from tests.sample_groups import encoder_of, group, three_groups, write_photos


@pytest.fixture
def encoder(tiny_llava_dir: Path, tmp_path: Path) -> Encoder:
    (tmp_path / "images").mkdir()
    return encoder_of(tiny_llava_dir, write_photos(tmp_path / "images"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records the name of an image whenever it is decoded or hashed."""
    names: list[str] = []
    for module, function in ((encode, "load_image"), (groups, "image_bytes_digest")):
        real = getattr(module, function)

        def record(root: Path, image: str, real=real):
            names.append(image)
            return real(root, image)

        monkeypatch.setattr(module, function, record)
    yield names


def measure(directory: Path, encoder: Encoder, indices: Sequence[int] = range(3), rank: int = 0) -> list[Measured]:
    dataset = GroupDataset(three_groups(), encoder, max_words=350, types=())
    return list(MeasuredLengths(directory, dataset, indices, rank).measure(num_workers=0))


def test_a_second_run_opens_no_image(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    first = measure(tmp_path / "lengths", encoder)
    assert sorted(set(opened)) == ["square.png", "tall.png", "wide.png"]
    opened.clear()
    assert measure(tmp_path / "lengths", encoder) == first
    assert opened == []
    dataset = GroupDataset(three_groups(), encoder, max_words=350, types=())
    assert first == [dataset.measure(i) for i in range(3)]


def test_only_changed_images_are_measured_again(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    first = measure(tmp_path / "lengths", encoder)
    Image.new("RGB", (56, 56), "red").save(encoder.image_root / "tall.png")
    opened.clear()
    second = measure(tmp_path / "lengths", encoder)
    assert set(opened) == {"tall.png", "square.png"}  # the images of the group with both
    assert second[0] == first[0] and second[2] == first[2] and second[1] != first[1]
    opened.clear()
    assert measure(tmp_path / "lengths", encoder) == second
    assert opened == []


def test_a_missing_or_damaged_image_is_detected(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    measure(tmp_path / "lengths", encoder)
    (encoder.image_root / "wide.png").unlink()
    (encoder.image_root / "square.png").write_bytes(b"not a picture")
    second = measure(tmp_path / "lengths", encoder)
    assert [m.reason if isinstance(m, Dropped) else "" for m in second] == ["bad-image"] * 3
    assert "missing" in second[0].detail  # type: ignore[union-attr]
    opened.clear()
    assert measure(tmp_path / "lengths", encoder) == second
    assert opened == []  # cached as unusable
    write_photos(encoder.image_root)
    assert not any(isinstance(m, Dropped) for m in measure(tmp_path / "lengths", encoder))


def test_a_killed_run_loses_only_the_line_being_written(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    first = measure(tmp_path / "lengths", encoder)
    (file,) = (tmp_path / "lengths").glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    opened.clear()
    assert measure(tmp_path / "lengths", encoder) == first
    assert set(opened) == {"square.png"}  # of the third group


def test_lines_of_the_wrong_shape_are_measured_again_with_a_warning(
    tmp_path: Path, encoder: Encoder, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = measure(tmp_path / "lengths", encoder)
    (file,) = (tmp_path / "lengths").glob("*.jsonl")
    kept, cut, *others = [json.loads(line) for line in file.read_text().splitlines()]
    damaged: list[object] = [{}, [], 3, None, {"key": [], "images": [], "measured": {}}]
    damaged += [{**cut, **other} for other in ({"measured": {}}, {"dropped": 1})]
    damaged.append({**cut, "measured": {**cut["measured"], "num_tokens": None}})
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [kept, *damaged, *others]))
    opened.clear()
    assert measure(tmp_path / "lengths", encoder) == first and opened
    warned = [f"{file}:{number}: unreadable line" in caplog.text for number in range(1, 11)]
    assert warned == [False, *[True] * len(damaged), False]


def test_the_line_format_is_that_of_earlier_versions(tmp_path: Path, encoder: Encoder) -> None:
    measure(tmp_path / "lengths", encoder)
    (file,) = (tmp_path / "lengths").glob("rank00000-*.jsonl")
    first = file.read_bytes().splitlines(keepends=True)[0]
    assert re.fullmatch(rb'{"key": "[0-9a-f]{64}", "images": \[\[\d+, \d+\]\], "measured": {.*}}\n', first)


def test_measured_lengths_are_shared_between_ranks(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    parts = [measure(tmp_path / "lengths", encoder, range(rank, 3, 2), rank) for rank in range(2)]
    opened.clear()
    assert measure(tmp_path / "lengths", encoder) == [parts[0][0], parts[1][0], parts[0][1]]
    assert opened == []


def test_a_stopped_measurement_is_kept(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    dataset = GroupDataset(three_groups(), encoder, max_words=350, types=())
    running = MeasuredLengths(tmp_path / "lengths", dataset, range(3)).measure(num_workers=0)
    next(running)
    running.close()
    opened.clear()
    measure(tmp_path / "lengths", encoder)
    assert "wide.png" not in opened and "tall.png" in opened


def test_the_fingerprint_covers_everything_that_affects_lengths(tiny_llava_dir: Path, encoder: Encoder) -> None:
    base = encoder_fingerprint(encoder, 350)
    root = encoder.image_root
    assert encoder_fingerprint(encoder_of(tiny_llava_dir, root), 350) == base
    changed = [encoder_fingerprint(encoder, 351), encoder_fingerprint(encoder_of(tiny_llava_dir, root, 1024), 350)]
    other = encoder_of(tiny_llava_dir, root)
    other.processor.image_processor.size = {"shortest_edge": 8}
    changed.append(encoder_fingerprint(other, 350))
    other = encoder_of(tiny_llava_dir, root)
    other.tokenizer.add_tokens(["newword"])
    changed.append(encoder_fingerprint(other, 350))
    for option in ({"image_aspect": "pad"}, {"system_prompt": "Be brief."}):
        model = ModelConfig(path=str(tiny_llava_dir))
        data = DataConfig(image_root=str(root), **option)  # type: ignore[arg-type]
        changed.append(encoder_fingerprint(load_encoder(Config(model=model, data=data)), 350))
    assert len({base, *changed}) == 7


def test_a_changed_text_is_measured_again(tmp_path: Path, encoder: Encoder) -> None:
    def lengths(*responses: str) -> Measured:
        dataset = GroupDataset([group("a", *responses)], encoder, max_words=350, types=())
        return next(MeasuredLengths(tmp_path / "lengths", dataset, [0]).measure(num_workers=0))

    short, long = lengths("a cat", "a dog"), lengths("a cat", "a dog and a very long tail of words")
    assert long.num_tokens > short.num_tokens  # type: ignore[union-attr]
    assert lengths("a cat", "a dog") == short


def test_other_weights_are_not_measured_again(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    def measured(*weights: float) -> list[Measured]:
        first, *others = three_groups()
        completions = tuple(replace(c, weight=w) for c, w in zip(first.completions, weights, strict=True))
        dataset = GroupDataset([replace(first, completions=completions), *others], encoder, max_words=350, types=())
        return list(MeasuredLengths(tmp_path / "lengths", dataset, range(3)).measure(num_workers=0))

    before = measured(1, 1, 1)
    opened.clear()
    assert measured(1, 0.5, 2) == before and opened == []
    assert measured(1, 0, 2) != before and set(opened) == {"wide.png"}


def test_an_unwritable_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    groups_file = tmp_path / "data" / "groups.jsonl"
    groups_file.parent.mkdir()
    assert lengths_directory(groups_file, tmp_path / "run") == tmp_path / "data" / "groups.jsonl.lengths"
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "data" not in str(path) and real(path, mode))
    with caplog.at_level("INFO"):
        assert lengths_directory(groups_file, tmp_path / "run") == tmp_path / "run" / "lengths"
    assert "cannot be written" in caplog.text
