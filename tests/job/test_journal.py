"""Append-only journals: torn lines, locks, readers that follow a writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bpo.job.journal import JournalReader, JournalWriter, from_line, to_line


def append(path: Path, *entries: Any) -> None:
    with JournalWriter(path, exclusive=True) as writer:
        writer.append(b"".join(map(to_line, entries)))


def poll(reader: JournalReader) -> list[Any]:
    return [entry for _, entry in reader.poll(lambda entry: entry)]


def test_lines_keep_half_surrogate_pairs() -> None:
    assert to_line({"a": "\u00e9"}) == b'{"a": "\\u00e9"}\n'
    line = to_line({"a": "\udc80\u00e9"}, ensure_ascii=False)
    assert line == b'{"a": "\xed\xb2\x80\xc3\xa9"}\n' and from_line(line) == {"a": "\udc80\u00e9"}


def test_a_reader_follows_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    append(path, 1, 2)
    reader = JournalReader(path)
    assert list(reader.poll(lambda entry: entry)) == [(0, 1), (2, 2)]
    assert poll(reader) == []
    append(path, 3)
    assert list(reader.poll(lambda entry: entry)) == [(4, 3)]


def test_a_line_that_is_still_being_written_is_read_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"1\n22")
    reader = JournalReader(path)
    assert poll(reader) == [1]
    path.write_bytes(b"1\n222\n")
    assert poll(reader) == [222]


@pytest.mark.parametrize("tail", [b"{", b"x" * 200_000, b"\0"])
def test_a_torn_last_line_is_dropped_by_the_next_writer(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"1\n2\n" + tail)
    append(path, 3)
    assert path.read_bytes() == b"1\n2\n3\n"
    assert str(path) in caplog.text and "cut short" in caplog.text
    path.write_bytes(tail)  # no complete line at all
    append(path, 4)
    assert path.read_bytes() == b"4\n"


def test_unreadable_lines_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n\n{"b": 2}\n\xff\n[3]\n{"a": 4}\n')
    assert [entry for _, entry in JournalReader(path).poll(lambda entry: entry["a"])] == [1, 4]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [f"{path}:{n}" for n in (2, 4, 5, 6)]
    caplog.clear()
    path.write_bytes(b'{"a": "x"}\n[]\n3\nnull\n{}\n')  # of another shape than the reader asks for
    assert [entry for _, entry in JournalReader(path).poll(lambda entry: entry.get("a").strip())] == ["x"]
    path.write_bytes(b'["x"]\n[]\n')
    assert [entry for _, entry in JournalReader(path).poll(lambda entry: entry[0])] == ["x"]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [f"{path}:{n}" for n in (2, 3, 4, 5, 2)]


def test_an_exclusive_journal_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import pathlib, sys\nfrom bpo.job.journal import *\nwriter = JournalWriter(pathlib.Path(sys.argv[1]), "
        "exclusive=True)\nlist(JournalReader(writer.path).poll(print))\nprint(1, flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin and other.stdout and other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="journal.jsonl is being written by another process"):
            JournalWriter(path, exclusive=True)
        JournalWriter(path, exclusive=False).close()
        other.stdin.close()
    append(path, 1)


def test_lines_are_synced_each_time_or_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for sync_each in (True, False):
        path = tmp_path / f"{sync_each}.jsonl"
        writer = JournalWriter(path, exclusive=False, sync_each=sync_each)
        writer.append(b"1\n")
        writer.append(b"2\n")
        assert path.read_bytes() == b"1\n2\n" and len(synced) == 2
        writer.close()
    assert len(synced) == 3
