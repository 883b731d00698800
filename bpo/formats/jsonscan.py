"""Streaming scanner for the values of a JSON text; memory is bounded by the longest value.

The standard library's decoder finds the end of a value, in C. A value that it rejects is skipped by matching brackets,
so a damaged record does not affect the others.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 64 << 20
MAX_CANDIDATES = 1000  # objects examined to find the next record after a damaged one
SKIPPED_CHARACTERS = 4 << 20  # search range for the end of a damaged record by its brackets only
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING_OR_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],"]', re.DOTALL)
_OBJECT_BEHIND_COMMA = re.compile(r',[ \t\r\n]*(\{[ \t\r\n]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:)')
# The decoder reports an error position this close to the end of the text if the text is incomplete.
_CUT_MARGIN = 16


@dataclass(frozen=True, slots=True)
class Damage:
    """Why a record could not be extracted: a code of `bpo.formats.problems.PROBLEMS` and a message."""

    code: str
    message: str


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


class JsonScanner:
    """Scans a JSON text from a file positioned at its start.

    Invalid UTF-8 bytes are decoded to lone surrogates (`surrogateescape`), so they invalidate only the record that
    contains them.

    Attributes:
        num_bytes: Bytes read so far.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._find_end = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._first: dict[str, Any] = {}
        self.num_bytes = 0

    def peek(self) -> str:
        """Returns the next non-space character without consuming it; empty at the end."""
        while True:
            self._at = _after_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Consumes one character.

        Raises:
            ValueError: The next character is a different one.
        """
        found = self.peek()
        if found != character:
            raise ValueError(f"not JSON: expected {character!r}, found {found or 'the end of the file'!r}")
        self._at += 1

    def value(self) -> str:
        """Returns the source of the next value.

        Raises:
            ValueError: The value is damaged.
        """
        source, damage = self._element()
        if damage is not None:
            raise ValueError(damage.message)
        return source

    def elements(self, is_whole: bool = False) -> Iterator[tuple[str, Damage | None]]:
        """Yields (source, damage) of each element of a list whose `[` has been read, and consumes its `]`.

        If the file ends before the list, the last element is a `Damage`.

        Args:
            is_whole: Nothing may follow the list; if objects like the first one do, the `]` was extraneous.
        """
        self._first = {}
        has_ended = False
        if self.peek() == "]":
            self._at += 1
            if not is_whole or not self.peek():
                return
            is_found = has_ended = self._skip_end()
            yield "", self._extra_data(is_found)
            if not is_found:
                return
        while True:
            source, damage = self._element()
            yield source, damage
            if damage is not None and damage.code in ("torn-record", "too-large"):
                self._at, self._text, self._ended = 0, "", True  # no way to find later records
                return
            self._note_first(source)
            character = self.peek()
            self._at += character in (",", "]") and bool(character)
            if character == "," or (character == "]" and not (is_whole and self.peek())):
                if character == "]":
                    return
                continue
            if not character:
                if not has_ended:
                    yield "", Damage("torn-record", "not JSON: the file ends inside the list; download it again")
                return
            is_found = self._skip_end() if character == "]" else self._skip_to_record(character)
            if character == "]":
                has_ended = True
                yield "", self._extra_data(is_found)
            else:
                yield "", Damage("not-json", "not JSON: a comma is missing after the previous record; add it")
            if not is_found:
                return

    def _skip_end(self) -> bool:
        """Advances from the end of a list to the next record behind it; returns whether there is one."""
        following = self.peek()
        self._at += following == "["  # another list
        return following in ("[", "{") or self._skip_to_record("]" if self._first else following)

    @staticmethod
    def _extra_data(is_found: bool) -> Damage:
        if is_found:
            return Damage("not-json", "not JSON: the list ends here, but records follow; remove the ']'")
        return Damage("not-json", "not JSON: the list ends here; what follows it is not read. Remove it, or the ']'")

    def _element(self) -> tuple[str, Damage | None]:
        self.peek()
        while True:
            try:
                _, end = self._find_end(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if not self._is_cut(error) or not self._more():
                    return self._skip_damaged(error)
                if len(self._text) > MAX_RECORD_CHARACTERS:
                    return "", Damage("too-large", "not JSON: unterminated record; look for a missing quotation mark")
                continue
            if end == len(self._text) and self._more():
                continue  # a number may continue in the next chunk
            start, self._at = self._at, end if end else self._at
            return self._text[start:end], None

    def _is_cut(self, error: ValueError | RecursionError) -> bool:
        """Returns whether the error may be due to incomplete text."""
        if self._ended or not isinstance(error, json.JSONDecodeError):
            return False
        # The error position of an unterminated string is its start, which may be far from the end.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _CUT_MARGIN

    def _skip_damaged(self, error: ValueError | RecursionError) -> tuple[str, Damage | None]:
        """Skips an invalid value by matching brackets; returns its source, so that parsing reports the error."""
        if self.peek() == "]":
            return "", Damage("not-json", "not JSON: there is a comma before the ']'; remove it")
        if self.peek() == ",":
            return "", Damage("not-json", "not JSON: empty element between two commas; remove one comma")
        depth = offset = end = 0  # relative to the start of the value
        while True:
            for match in _STRING_OR_MARK.finditer(self._text, self._at + offset) if not end else ():
                token = match.group()
                if token == '"':
                    break  # the string continues in the next chunk
                offset = match.end() - self._at
                depth += (token in "{[") - (token in "}]")
                # A value ends at its closing bracket, or at a comma or bracket of the enclosing list.
                if depth < 0 or (depth == 0 and token in "}],"):
                    end = match.start() - self._at if depth < 0 or token == "," else offset
                    break
            found = self._resume(end)
            if found:
                start, self._at = self._at, found
                return self._text[start:found], None
            limit = SKIPPED_CHARACTERS if end else MAX_RECORD_CHARACTERS
            if len(self._text) - self._at > limit or not self._more():
                if end:
                    start, self._at = self._at, self._at + end
                    return self._text[start : self._at], None
                self.peek()
                text = "nested too deeply or truncated" if isinstance(error, RecursionError) else str(error)
                message = f"not JSON ({text}); the file ends inside the record; download it again"
                return "", Damage("torn-record", message)

    def _resume(self, end: int) -> int:
        """Returns the position at which to resume after a damaged value, or 0 if it is not known yet.

        Args:
            end: Offset of the closing bracket from the start of the value; 0 if not found. Wrong if the value lacks a
                bracket or a quotation mark.
        """
        if not self._first:
            return self._at + end if end else 0
        match = self._next_record(self._at + 1)
        if end and (match is None or match.start() > self._at + end):
            key = json.dumps(next(iter(self._first)), ensure_ascii=False)
            behind = _OBJECT_BEHIND_COMMA.match(self._text, _after_space(self._text, self._at + end))
            if behind is not None and behind.group(2) == key:
                return self._at + end
        return match.start() if match is not None else 0

    def _next_record(self, position: int) -> re.Match[str] | None:
        """Finds the next comma before an object with over half the keys of the first record, in the buffered text."""
        for _ in range(MAX_CANDIDATES):
            match = _OBJECT_BEHIND_COMMA.search(self._text, position)
            if match is None:
                return None
            position = match.end()
            try:
                value, _ = self._find_end(self._text, match.start(1))
            except (ValueError, RecursionError):
                continue
            if 2 * len(value.keys() & self._first.keys()) > len(self._first):
                return match
        return None

    def _skip_to_record(self, character: str) -> bool:
        """Advances to the likely start of the next record; returns whether one was found.

        Args:
            character: The unexpected character at or just before the current position.
        """
        while self._first and character != "{":
            match = self._next_record(self._at)
            if match is not None:
                self._at = match.start(1)
                return True
            if len(self._text) - self._at > SKIPPED_CHARACTERS or not self._more():
                break
        found = self._text.find("{", self._at) if character != "]" else -1
        while found < 0 and character != "]":
            self._at = len(self._text)
            if not self._more():
                break
            found = self._text.find("{", self._at)
        self._at = found if found >= 0 else len(self._text)
        return found >= 0

    def _note_first(self, source: str) -> None:
        if not self._first and source.startswith("{"):
            with suppress(ValueError, RecursionError):
                self._first = json.loads(source)

    def _more(self) -> bool:
        """Reads a chunk at least as long as the buffered rest, so that a long record is reparsed only a few times."""
        if self._ended:
            return False
        kept = self._text[self._at :]
        raw = self._file.read(max(CHUNK_BYTES, len(kept)))
        self.num_bytes += len(raw)
        self._ended = not raw
        self._text, self._at = kept + self._decode(raw, final=not raw), 0
        return bool(raw)
