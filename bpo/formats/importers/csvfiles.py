"""CSV and TSV with a heading. A stray quotation mark costs the line that it stands in, not those that it swallows."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from bpo.formats.jsonfiles import Piece, open_file
from bpo.formats.jsonscan import Damage

MAX_CELL_CHARACTERS = 16 << 20
# So many lines in a cell, each with the separators of a row, are rows: texts hold commas, and hardly ever tabs.
_SWALLOWED_LINES = {",": 5, "\t": 1}


def table_pieces(path: Path, separator: str) -> Iterator[Piece]:
    """One record a row: heading -> cell, empty cells left out.

    Raises:
        ValueError: The file or its heading cannot be read.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    with open_file(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
        lines = _Lines(file)
        rows = csv.reader(lines, delimiter=separator, strict=True)
        heading = _heading(path, rows)
        index = 0
        while True:
            where = f"{path}, line {lines.begin_row()}"
            try:
                row, damage = _damage(next(rows), len(heading), separator, lines)
            except StopIteration:
                return
            except csv.Error as error:
                row, damage = [], Damage("wrong-columns", f"not a row of a table ({error}); quote its cells")
            if damage is not None:
                lines.give_back()
            elif not row:
                continue  # a blank line
            cells = {name: cell for name, cell in zip(heading, row, strict=False) if cell != ""}
            yield Piece(where, index, False, cells, damage)
            index += 1


def _heading(path: Path, rows: Iterator[list[str]]) -> list[str]:
    try:
        heading = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise ValueError(f"{path}: no heading can be read ({error}); name the columns in the first line") from error
    if heading[:1] == [""] and len(heading) > 1:
        heading[0] = "Unnamed: 0"  # as pandas reads the index that it wrote
    if len(set(heading)) != len(heading) or "" in heading:
        raise ValueError(f"{path}: the heading {heading} repeats a name or leaves one out; name every column once")
    return heading


def _damage(row: list[str], num_columns: int, separator: str, lines: _Lines) -> tuple[list[str], Damage | None]:
    if not row:
        return row, None
    if len(row) != num_columns:
        message = f"{len(row)} cells under {num_columns} headings; quote the separator"
        return row, Damage("wrong-columns", message)
    inner = lines.row[1:-1]
    if len(inner) >= _SWALLOWED_LINES[separator] and all(line.count(separator) == num_columns - 1 for line in inner):
        return row, Damage("wrong-columns", "a cell holds whole rows: its quotation mark ends too late; remove it")
    if not all(cell.isascii() or _is_utf8(cell) for cell in row):
        return row, Damage("invalid-utf8", "a cell is not UTF-8; convert the file with iconv")
    return row, None


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in text)


class _Lines:
    """Lines for a `csv.reader`, which takes several for a row where a quotation mark is open.

    Attributes:
        row: The lines of the present row.
    """

    def __init__(self, file: Iterable[str]):
        self._file = iter(file)
        self._returned: deque[str] = deque()
        self._number = 0
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._file)
        self.row.append(line)
        self._number += 1
        return line

    def begin_row(self) -> int:
        """Forgets the row before; the number of the line that comes."""
        self.row = []
        return self._number + 1

    def give_back(self) -> None:
        """The lines of the row behind its first come again, as rows of their own."""
        self._returned.extendleft(reversed(self.row[1:]))
        self._number -= len(self.row[1:])
