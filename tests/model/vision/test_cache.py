"""Features kept in memory and on disk."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch

from bpo.model.vision import cache
from bpo.model.vision.cache import DiskCache, MemoryCache

FINGERPRINT = {"file:model.safetensors": "aa", "dtype": "bfloat16"}
GB = 1e9


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def features(seed: int, rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[K, R, D], of an odd number of bytes per row in pairs of words."""
    made = torch.randn(1, rows, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    made[0, 0, 0] = torch.nan  # a bit pattern that arithmetic would not keep
    return made


def same(actual: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return (
        actual is not None
        and actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    )


def opened(folder: Path, fingerprint: dict[str, str] = FINGERPRINT, gigabytes: float = 1.0, **named: int) -> DiskCache:
    return DiskCache(folder, fingerprint, torch.bfloat16, gigabytes * GB, **named)


def filled(folder: Path, count: int = 4) -> list[torch.Tensor]:
    """Entries 0, 1, ... of different sizes, written by one rank that is then gone."""
    entries = [features(i, rows=2 + i) for i in range(count)]
    writer = opened(folder)
    for i, entry in enumerate(entries):
        writer.put(key(str(i)), entry)
    writer.close()
    return entries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_process_reads_what_one_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cache, "_RESCAN_SHARE", 1e9)
    writer = DiskCache(tmp_path, FINGERPRINT, dtype, GB)
    written = [features(i, rows=2 + i, dtype=dtype) for i in range(3)]
    for i, entry in enumerate(written):
        assert writer.get(key(str(i))) is None
        writer.put(key(str(i)), entry)
    assert same(writer.get(key("1")), written[1])  # its own, before it is closed
    writer.close()
    reader = DiskCache(tmp_path, FINGERPRINT, dtype, GB)
    assert all(same(reader.get(key(str(i))), entry) for i, entry in enumerate(written))
    assert reader.get(key("3")) is None


def test_entries_of_other_ranks_are_found_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = opened(tmp_path, rank=1, world_size=2)
    (entry, *_) = filled(tmp_path)
    assert reader.get(key("0")) is None
    monkeypatch.setattr(cache, "_RESCAN_S", 0.0)
    assert same(reader.get(key("0")), entry)


@pytest.mark.parametrize("suffix", ["index", "values"])
def test_a_kill_in_the_middle_of_a_write_costs_the_last_entry(tmp_path: Path, suffix: str) -> None:
    """At every byte of the last entry's record or values."""
    entries = filled(tmp_path)
    (file,) = tmp_path.glob(f"*/*.{suffix}")
    content = file.read_bytes()
    last = 52 if suffix == "index" else 4 * 8 + entries[-1].nbytes
    for cut in (1, last // 2, last - 1, last):
        file.write_bytes(content[: len(content) - cut])
        reader = opened(tmp_path)
        assert all(same(reader.get(key(str(i))), entry) for i, entry in enumerate(entries[:-1]))
        assert reader.get(key("3")) is None
        reader.put(key("3"), entries[-1])
        reader.close()
        assert same(opened(tmp_path).get(key("3")), entries[-1])
        for made in {*tmp_path.glob("*/rank*")} - {file, file.with_suffix(".index"), file.with_suffix(".values")}:
            made.unlink()


def test_damaged_features_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = filled(tmp_path)
    (file,) = tmp_path.glob("*/*.values")
    content = bytearray(file.read_bytes())
    for position in (40, len(content) - 1):  # in the first and in the last
        content[position] ^= 1
    file.write_bytes(content)
    damaged = opened(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = [damaged.get(key(str(i))) for i in range(4)]
    assert found[0] is None and found[3] is None
    assert same(found[1], entries[1]) and same(found[2], entries[2])
    assert [r.message for r in caplog.records] == [
        f"{file}: damaged features are computed again (the first: {key('0')[:12]})"
    ]
    for i in (0, 3):
        damaged.put(key(str(i)), entries[i])
    damaged.close()
    repaired = opened(tmp_path)
    assert all(same(repaired.get(key(str(i))), entry) for i, entry in enumerate(entries))


def test_features_of_another_model_are_not_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = filled(tmp_path)
    other = opened(tmp_path, {**FINGERPRINT, "file:model.safetensors": "bb"})
    assert other.get(key("0")) is None
    other.put(key("0"), entries[1])
    other.close()
    assert same(opened(tmp_path).get(key("0")), entries[0])
    # Moved into the wrong folder.
    (index,) = (folder for folder in tmp_path.glob("*/*.index") if folder.parent.name == other._directory.name)
    for file in (index, index.with_suffix(".values")):
        (home,) = (folder for folder in tmp_path.iterdir() if folder != index.parent)
        file.rename(home / file.name)
    with caplog.at_level(logging.WARNING):
        assert same(opened(tmp_path).get(key("0")), entries[0])
    assert "belongs to another model" in caplog.text


def test_a_full_cache_keeps_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = 64 / GB  # 8 words of shape, 30 bytes and padding
    for _ in range(2):  # what is there counts
        small = opened(tmp_path, gigabytes=2.5 * size)
        memory = MemoryCache(2.5 * features(0).nbytes)
        with caplog.at_level(logging.WARNING):
            for i in range(4):
                small.put(key(str(i)), features(i))
                memory.put(key(str(i)), features(i))
        small.close()
    reader = opened(tmp_path)
    assert [reader.get(key(str(i))) is not None for i in range(4)] == [True, True, False, False]
    assert [memory.get(key(str(i))) is not None for i in range(4)] == [True, True, False, False]
    assert same(memory.get(key("1")), features(1))
    assert "raise vision.cache_gb" in caplog.text
    assert opened(tmp_path, gigabytes=6 * size, world_size=2)._room._left == pytest.approx(2 * size * GB)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set vision.cache_dir to a writable folder"):
        opened(tmp_path / "file")
