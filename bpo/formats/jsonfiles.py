"""Streaming readers for JSON lists and JSONL; errors name the file, the record and the fix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from bpo.formats.compressed import decompressed
from bpo.formats.jsonscan import MAX_RECORD_CHARACTERS, Damage, JsonScanner
from bpo.formats.problems import RecordError

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1024  # from which the kind of file is known
# An invalid UTF-8 byte as decoded by the error handler `surrogateescape`.
_FOREIGN_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class JsonRecord:
    """One object of a file.

    Attributes:
        where: File and line (JSONL) or file and position (JSON list), for error messages.
        index: 0-based position among the records.
        from_list: Whether the file is one JSON list.
        value: The object.
    """

    where: str
    index: int
    from_list: bool
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Unparsed source of one record; worker processes parse it.

    Attributes:
        where: File and line or position.
        index: 0-based position among the records.
        from_list: Whether the file is one JSON list.
        source: JSON as bytes (JSONL) or text (JSON list), or an object from a table.
        damage: Code and message if the source could not be extracted.
        is_torn: Whether this is the last line and lacks a line break.
        end_bytes: Bytes of the file read so far, including this record.
    """

    where: str
    index: int
    from_list: bool
    source: bytes | str | dict[str, Any]
    damage: Damage | None = None
    is_torn: bool = False
    end_bytes: int = 0

    def parse(self) -> dict[str, Any]:
        """Parses the record.

        Raises:
            RecordError: The source is damaged, not JSON, or not an object.
        """
        if self.damage is not None:
            raise RecordError(self.damage.code, f"{self.where}: {self.damage.message}")
        if isinstance(self.source, dict):
            return self.source
        try:
            value = parse_json(self.source, self.where)
        except RecordError as error:
            if not self.is_torn or error.code != "not-json":
                raise
            message = f"{error}; the last line has no line break: the file may be truncated"
            raise RecordError("torn-record", message) from error
        if not isinstance(value, dict):
            raise RecordError(
                "not-an-object", f"{self.where}: a record is {type(value).__name__}, not an object; write {{...}}"
            )
        return value


def read_records(path: Path) -> Iterator[JsonRecord]:
    """Yields the objects of a JSON list or a JSONL file (one object per line, blank lines skipped) in bounded memory.

    A file whose first non-space character is `[` is a JSON list.

    Raises:
        ValueError: The file is missing, not UTF-8 or not JSON, or a record is not an object.
    """
    for piece in json_pieces(path):
        yield JsonRecord(piece.where, piece.index, piece.from_list, piece.parse())


def json_pieces(path: Path) -> Iterator[Piece]:
    """Yields the unparsed records of a JSON list or a JSONL file; damaged records are marked and skipped over.

    Raises:
        ValueError: The file cannot be read.
    """
    with open_file(path) as file:
        if file.read(3) != BOM:
            file.seek(0)
        start = file.tell()
        is_list = file.read(HEAD_BYTES).lstrip().startswith(b"[")
        file.seek(start)
        yield from _list_pieces(path, file) if is_list else _line_pieces(path, file)


def open_file(path: Path) -> BinaryIO:
    """Opens a file of records; a compressed one as a stream of its content (`bpo.formats.compressed`).

    Raises:
        ValueError: Names the file and the reason.
    """
    try:
        # Opening a pipe may block, and it can be read only once.
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path} is not a regular file; write its content to one")
        return decompressed(path, Path(path).open("rb"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _list_pieces(path: Path, file: BinaryIO) -> Iterator[Piece]:
    scanner = JsonScanner(file)
    scanner.expect("[")
    for index, (source, damage) in enumerate(scanner.elements(is_whole=True)):
        yield Piece(f"{path}, record {index}", index, True, source, damage, end_bytes=scanner.num_bytes)


def _line_pieces(path: Path, file: BinaryIO) -> Iterator[Piece]:
    # Split bytes at \n only: str.splitlines also splits at U+2028, which may occur inside a JSON string.
    index = num_bytes = 0
    number = 1
    while line := file.readline(MAX_RECORD_CHARACTERS):
        num_bytes += len(line)
        where = f"{path}, line {number}"
        if len(line) == MAX_RECORD_CHARACTERS and not line.endswith(b"\n"):
            while rest := file.readline(MAX_RECORD_CHARACTERS):
                num_bytes += len(rest)
                if rest.endswith(b"\n"):
                    break
            damage = Damage(
                "too-large", f"a line of more than {MAX_RECORD_CHARACTERS >> 20} MiB; write one record per line"
            )
            yield Piece(where, index, False, b"", damage, end_bytes=num_bytes)
            index += 1
        elif line.strip():
            yield Piece(where, index, False, line, None, not line.endswith(b"\n"), num_bytes)
            index += 1
        number += 1


def parse_json(raw: bytes | str, where: str) -> Any:
    """Parses strict JSON: UTF-8, without NaN or Infinity.

    Args:
        raw: Bytes, or text decoded with `surrogateescape`.
        where: File and record, for messages.

    Raises:
        RecordError: Names `where` and the problem.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1  # type: ignore[arg-type]
        raise RecordError(
            "invalid-utf8",
            f"{where}: byte {error.start} (line {line} of it) is not UTF-8; convert the file with iconv",
        ) from error
    if isinstance(raw, str) and not text.isascii() and (foreign := _FOREIGN_BYTE.search(text)):
        byte = ord(foreign.group()) - 0xDC00
        raise RecordError("invalid-utf8", f"{where}: byte 0x{byte:02x} is not UTF-8; convert the file with iconv")
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise RecordError("nested-too-deeply", f"{where}: the JSON is nested too deeply; flatten it") from error
    except ValueError as error:
        code = "nan" if isinstance(error, _NotANumber) else "not-json"
        cause = _dialect(text, error.pos) if isinstance(error, json.JSONDecodeError) else None
        fix = cause or f"({error}); write one object per line, or one JSON list"
        raise RecordError(code, f"{where}: not JSON {fix}") from error


def _dialect(text: str, position: int) -> str | None:
    """Returns what is not JSON at the position of an error, and the fix, if it is of JSON5 or Python."""
    rest, before = text[position : position + 20].lstrip(), text[:position].rstrip()[-1:]
    if rest[:1] in ("}", "]") and before == ",":
        return f"(there is a comma before '{rest[0]}'); remove it"
    if rest[:1] == "'" or re.match(r"(?:None|True|False)\b", rest):
        return "but Python's notation (single quotes, None, True); write it with json.dumps"
    if rest.startswith(("//", "/*", "#")):
        return "(there is a comment); remove it"
    if before in ("{", ",") and re.match(r"[A-Za-z_$][\w$]*\s*:", rest):
        return '(there is a key without quotation marks); write it as "key"'
    return None


class _NotANumber(ValueError):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NotANumber(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
