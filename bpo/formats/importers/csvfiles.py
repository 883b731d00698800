"""CSV and TSV files with a header. An unbalanced quote invalidates only its own line."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from bpo.formats.jsonfiles import Piece, open_file
from bpo.formats.jsonscan import Damage

MAX_CELL_CHARACTERS = 16 << 20
MAX_ROW_CHARACTERS = 64 << 20
MAX_REREAD_CHARACTERS = 256 << 20  # each damaged row is read again line by line, so a file of them would never end
# Minimum number of row-like lines in a cell to treat it as swallowed rows; text often has commas, but rarely tabs.
_SWALLOWED_LINES = {",": 5, ";": 5, "\t": 1}


def table_pieces(path: Path, separator: str) -> Iterator[Piece]:
    """Yields one record per row: column name -> cell, without empty cells.

    A header without commas but with semicolons is of a table from Excel in a locale with a decimal comma.

    Raises:
        ValueError: The file or its header cannot be read.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    with open_file(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
        lines = _Lines(file)
        first = lines.peek()
        if separator == "," and "," not in first and ";" in first:
            separator = ";"
        rows = csv.reader(lines, delimiter=separator, strict=True)
        header = _header(path, rows)
        index = 0
        while True:
            where = f"{path}, line {lines.begin_row()}"
            try:
                row, damage = _damage(next(rows), len(header), separator, lines)
            except StopIteration:
                return
            except csv.Error as error:
                row, damage = [], Damage("wrong-columns", f"not a valid row ({error}); quote its cells")
            if damage is not None:
                num_lost = lines.give_back()
                if num_lost:
                    damage = replace(damage, message=f"{damage.message}; the next {num_lost} lines are lost with it")
            elif not row:
                continue  # a blank line
            cells = {name: cell for name, cell in zip(header, row, strict=False) if cell != ""}
            yield Piece(where, index, False, cells, damage)
            index += 1


def _header(path: Path, rows: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise ValueError(f"{path}: the header is unreadable ({error}); name the columns in the first line") from error
    if header[:1] == [""] and len(header) > 1:
        header[0] = "Unnamed: 0"  # pandas' name for the index column it wrote
    if len(set(header)) != len(header) or "" in header:
        raise ValueError(f"{path}: the header {header} has duplicate or empty names; give every column a unique name")
    return header


def _damage(row: list[str], num_columns: int, separator: str, lines: _Lines) -> tuple[list[str], Damage | None]:
    if not row:
        return row, None
    if len(row) != num_columns:
        message = f"{len(row)} cells for {num_columns} columns; quote cells that contain the separator"
        return row, Damage("wrong-columns", message)
    inner = lines.row[1:-1]
    if len(inner) >= _SWALLOWED_LINES[separator] and all(line.count(separator) == num_columns - 1 for line in inner):
        return row, Damage("wrong-columns", "a cell contains whole rows: its closing quote is misplaced; fix it")
    if not all(cell.isascii() or _is_utf8(cell) for cell in row):
        return row, Damage("invalid-utf8", "a cell is not UTF-8; convert the file with iconv")
    return row, None


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in text)


class _Lines:
    """Line source for `csv.reader`, which reads several lines per row while a quote is open.

    Attributes:
        row: Lines of the current row.
    """

    def __init__(self, file: IO[str]):
        self._file = file
        self._row_characters = self._reread_characters = 0
        self._returned: deque[str] = deque()
        self._number = 0
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else self._file.readline(MAX_CELL_CHARACTERS)
        if not line:
            raise StopIteration
        self.row.append(line)
        self._number += 1
        self._row_characters += len(line)
        if self._row_characters > MAX_ROW_CHARACTERS:
            raise csv.Error(f"it has more than {MAX_ROW_CHARACTERS >> 20} MiB")
        return line

    def peek(self) -> str:
        """Returns the next line without consuming it; empty at the end."""
        if not self._returned:
            self._returned.append(self._file.readline(MAX_CELL_CHARACTERS))
        return self._returned[0]

    def begin_row(self) -> int:
        """Starts a new row; returns the number of the next line."""
        self.row, self._row_characters = [], 0
        return self._number + 1

    def give_back(self) -> int:
        """Pushes back all lines of the row except the first, to be read as separate rows.

        Returns:
            The number of lines that are lost instead, once `MAX_REREAD_CHARACTERS` are used up.
        """
        self._reread_characters += self._row_characters
        if self._reread_characters > MAX_REREAD_CHARACTERS:
            return len(self.row) - 1
        self._returned.extendleft(reversed(self.row[1:]))
        self._number -= len(self.row[1:])
        return 0
