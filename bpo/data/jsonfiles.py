"""Reading JSON lists and JSONL with errors that name the file, the line and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class JsonRecord:
    """One object of a file.

    Attributes:
        where: File and line (JSONL) or file and position (JSON list), for error messages.
        index: 0-based position among the records.
        from_list: The file is one JSON list.
        value: The object.
    """

    where: str
    index: int
    from_list: bool
    value: dict[str, Any]


def read_records(path: Path) -> Iterator[JsonRecord]:
    """The objects of a JSON list, or of a JSONL file (one object a line, blank lines skipped).

    The first character that is not white space decides: `[` starts a list.

    Raises:
        ValueError: The file is missing, not UTF-8 or not JSON, or a record is not an object.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        yield from _read_list(path, raw)
        return
    index = 0
    # Split bytes at \n only: str.splitlines would also cut at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            value = parse_json(line, where)
            yield JsonRecord(where, index, False, _object(value, where))
            index += 1


def parse_json(raw: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity.

    Raises:
        ValueError: Names `where` and what is wrong.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{where}: byte {error.start} (line {line} of it) is not UTF-8; convert the file with iconv"
        ) from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{where}: the JSON is nested too deeply; flatten it") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object a line, or one JSON list") from error


def _read_list(path: Path, raw: bytes) -> Iterator[JsonRecord]:
    for index, value in enumerate(parse_json(raw, str(path))):
        where = f"{path}, record {index}"
        yield JsonRecord(where, index, True, _object(value, where))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a record is {type(value).__name__}, not an object; write {{...}}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
