"""Names files that are not what their name says: an LFS pointer, a web page, a workbook, an archive."""

from __future__ import annotations

# (start of the file in lower case, what it is and what to do)
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer without the data; fetch them with `git lfs pull`"),
    (b"<!doctype html", "a web page, such as a login or error page; download the file itself"),
    (b"<html", "a web page, such as a login or error page; download the file itself"),
    (b"<svg", "an SVG drawing; convert it to PNG"),
    (b"<?xml", "an XML file (an SVG drawing or a server's error message); download or convert the file itself"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook; save it as CSV UTF-8"),
    (b"\x89hdf", "an HDF5 file; write JSONL or parquet"),
    (b"\x93numpy", "a NumPy array; write JSONL or parquet"),
    (b"arrow1", "an Arrow file; write parquet with `datasets.Dataset.from_file(...).to_parquet(...)`"),
    (b"\xff\xff\xff\xff", "an Arrow stream; write parquet with `datasets.Dataset.from_file(...).to_parquet(...)`"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"rar!", "a RAR archive; unpack it"),
    (b"%pdf", "a PDF document; extract its content"),
)


def foreign_kind(head: bytes, name: str = "") -> str | None:
    """Returns what a file is and the next step, from its first bytes, or None if it may be data.

    Args:
        head: The first bytes; a few hundred suffice.
        name: The file's name, to tell a workbook from other zip archives.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, meaning in _KINDS:
        if start.startswith(signature):
            return meaning
    if start.startswith(b"pk\x03\x04"):
        is_workbook = name.lower().endswith((".xlsx", ".xlsm", ".ods")) or b"[content_types].xml" in start
        return "an Excel workbook; save it as CSV UTF-8" if is_workbook else "a zip archive; unpack it"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which can run code when it is loaded; write JSONL"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"hevc"):
        return "a HEIC picture; convert it to JPEG or PNG"
    return None
