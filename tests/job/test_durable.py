"""Files replaced as a whole, with faults at every step."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from bpo.job.durable import replacing, write_durably
from bpo.job.journal import JournalWriter


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("old\n")
    with replacing(path) as file:
        file.write(b"new\n")
        file.flush()
        assert path.read_text() == "old\n"
    assert path.read_text() == "new\n"
    write_durably(path, "\u00e9")
    assert path.read_bytes() == b"\xc3\xa9"
    write_durably(path, b"\xff", sync=False)
    assert path.read_bytes() == b"\xff"
    assert os.listdir(tmp_path) == ["lines.jsonl"]


def refuse(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["body", "fsync", "replace"])
def test_an_error_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    if fault != "body":
        monkeypatch.setattr(os, fault, refuse)
    with pytest.raises(OSError, match="No space left"), replacing(path) as file:
        file.write(b"new")
        if fault == "body":
            refuse()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_file_system_that_cannot_sync_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(tmp_path / "file", "new")
    with JournalWriter(tmp_path / "lines.jsonl", exclusive=False) as journal:
        journal.append(b"1\n")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "lines.jsonl").read_text() == "1\n"


def test_content_is_synced_before_the_name_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    write_durably(tmp_path / "file", "new")
    assert calls == ["fsync", "replace", "fsync"]
    write_durably(tmp_path / "file", "newer", sync=False)
    assert calls[3:] == ["replace"]


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]
