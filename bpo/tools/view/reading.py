"""Random access to the lines of a JSONL file by record id; only the offsets are in memory."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bpo.formats.bad_records import BadRecords
from bpo.formats.problems import Problem

Entry = dict[str, Any]
# Longest line read, in bytes: the record limit of `bpo.formats`.
MAX_LINE_BYTES = 64 << 20


class LinesById:
    """The objects of a JSONL file by their `id`. Offsets are in memory; lines are read on access.

    Args:
        path: The file; None and a missing file count as empty.
        check: Raises KeyError, TypeError or ValueError for an invalid object.
        bad: Collects invalid lines.
        advice: The fix, appended to the messages about invalid lines.

    Raises:
        RecordError: `bad.on_bad` is error, and a line is invalid.
    """

    def __init__(self, path: Path | None, check: Callable[[Entry], object], bad: BadRecords, advice: str):
        self.path = path
        self._places: dict[str, array[int]] = {}
        self.num_lines = 0
        if path is None or not path.exists():
            return
        offset = 0
        with path.open("rb") as file:
            for number in itertools.count(1):
                if not (line := file.readline(MAX_LINE_BYTES)):
                    break
                if line.strip():
                    self.num_lines += 1
                    self._take(line, f"{path}, line {number}", offset, check, bad, advice)
                offset += len(line)

    def _take(
        self, line: bytes, where: str, offset: int, check: Callable[[Entry], object], bad: BadRecords, advice: str
    ) -> None:
        try:
            entry = _parsed(line)
            check(entry)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            code = "missing-field" if isinstance(error, KeyError) else "not-json"
            bad.report(Problem(code, where, None, f"{where}: {what}; {advice}"))
        else:
            self._places.setdefault(str(entry["id"]), array("Q")).append(offset)

    def __iter__(self) -> Iterator[str]:
        """The ids, in file order."""
        return iter(self._places)

    def get(self, record_id: str) -> list[Entry]:
        """The objects of a record, in file order."""
        places = self._places.get(record_id)
        if not places or self.path is None:
            return []
        found = []
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place)
                found.append(_parsed(file.readline(MAX_LINE_BYTES)))
        return found


def _parsed(line: bytes) -> Entry:
    entry = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    json.dumps(entry, ensure_ascii=False).encode("utf-8")  # raises ValueError for unpaired surrogates
    return entry


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid JSON number")
