"""Files that are not what their name says are named, with the next step."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bpo.formats.files import read_annotations


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer .* `git lfs pull`"),
        ("a.json", b"\xef\xbb\xbf <!DOCTYPE html><html>Access denied", "a web page, such as a login or error page"),
        ("a.json", b'[{"image": "a.png", "caption": "x",},]', "there is a comma before '}'.; remove it"),
        ("a.jsonl", b"{'image': 'a.png', 'caption': None}\n", "Python's notation .* write it with json.dumps"),
        ("a.json", b'[{"image": "a.png", // the photo\n"caption": "x"}]', "there is a comment.; remove it"),
        ("a.json", b'[{image: "a.png", "caption": "x"}]', "a key without quotation marks"),
        ("a.xlsx", b"PK\x03\x04", "an Excel workbook; save it as CSV"),
        ("a.bin", b"PK\x03\x04", "a zip archive; unpack it"),
        ("a.jsonl", b"\x80\x04\x95", "a Python pickle, which can run code"),
        ("a.parquet", gzip.compress(b"PAR1", mtime=0), "a parquet file inside gzip; unpack it"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_annotations(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_a_pointer_among_shards_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png"], "caption": ["A bus."]}), tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\n")
    with pytest.raises(ValueError, match="1.parquet is a Git LFS pointer without the data"):
        read_annotations(tmp_path)
