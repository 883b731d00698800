"""Finds the values of a JSON text of any size one after the other, in memory of the longest one.

The decoder of the standard library finds where a value ends, in C; what it refuses is skipped by matching brackets, so
that one damaged record does not cost the others.
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
MAX_CANDIDATES = 1000  # objects that are looked at for the next record behind a damaged one
SKIPPED_CHARACTERS = 4 << 20  # in which the end of a damaged record is looked for by its brackets alone
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING_OR_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],"]', re.DOTALL)
_OBJECT_BEHIND_COMMA = re.compile(r',[ \t\r\n]*(\{[ \t\r\n]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:)')
# The decoder names a place this near the end of what it was given when it ran out of text.
_CUT_MARGIN = 16


@dataclass(frozen=True, slots=True)
class Damage:
    """Why a record could not be cut out: a code of `bpo.formats.problems.PROBLEMS` and a message."""

    code: str
    message: str


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


class JsonScanner:
    """Reads a JSON text from a file that stands at its beginning.

    Bytes that are not UTF-8 become lone surrogates (`surrogateescape`): the record that holds them is found bad, and
    not the file.

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
        """The next character that is not white space, which stays; empty at the end."""
        while True:
            self._at = _after_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Steps over one character.

        Raises:
            ValueError: Another one stands there.
        """
        found = self.peek()
        if found != character:
            raise ValueError(f"not JSON: {character!r} should stand where {found or 'the end of the file'!r} is")
        self._at += 1

    def value(self) -> str:
        """The source of the next value.

        Raises:
            ValueError: It is damaged.
        """
        source, damage = self._element()
        if damage is not None:
            raise ValueError(damage.message)
        return source

    def elements(self, is_whole: bool = False) -> Iterator[tuple[str, Damage | None]]:
        """The elements of a list whose `[` has been read, up to and with its `]`: source, or what damaged it.

        Where the file ends too early the last element says so.

        Args:
            is_whole: Nothing may follow the list; where objects like the first one do, its `]` was one too many.
        """
        self._first = {}
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            source, damage = self._element()
            yield source, damage
            if damage is not None and damage.code in ("torn-record", "too-large"):
                self._at, self._text, self._ended = 0, "", True  # nothing after it can be told apart
                return
            self._note_first(source)
            character = self.peek()
            self._at += character in (",", "]") and bool(character)
            if character == "," or (character == "]" and not (is_whole and self.peek())):
                if character == "]":
                    return
                continue
            if not character:
                yield "", Damage("torn-record", "not JSON: the file ends before the list does; fetch it again")
                return
            if character == "]":
                yield "", Damage("not-json", "not JSON: something stands behind the end of the list; remove it")
            else:
                yield "", Damage("not-json", "not JSON: a comma is missing after the record before; add it")
            if not self._skip_to_record(character):
                return

    def _element(self) -> tuple[str, Damage | None]:
        self.peek()
        while True:
            try:
                _, end = self._find_end(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if not self._is_cut(error) or not self._more():
                    return self._skip_damaged(error)
                if len(self._text) > MAX_RECORD_CHARACTERS:
                    return "", Damage("too-large", "not JSON: a record without end; look for a missing quotation mark")
                continue
            if end == len(self._text) and self._more():
                continue  # a number may go on
            start, self._at = self._at, end if end else self._at
            return self._text[start:end], None

    def _is_cut(self, error: ValueError | RecursionError) -> bool:
        """Whether more text may help."""
        if self._ended or not isinstance(error, json.JSONDecodeError):
            return False
        # An open string is named by where it begins, which may be far from the end.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _CUT_MARGIN

    def _skip_damaged(self, error: ValueError | RecursionError) -> tuple[str, Damage | None]:
        """Steps over a value that is not JSON, by its brackets; hands out its source, for parsing to say what it is."""
        if self.peek() in (",", "]"):
            return "", Damage("not-json", "not JSON: nothing stands between two commas; remove one")
        depth = offset = end = 0  # from where the value begins
        while True:
            for match in _STRING_OR_MARK.finditer(self._text, self._at + offset) if not end else ():
                token = match.group()
                if token == '"':
                    break  # its other end is not here yet
                offset = match.end() - self._at
                depth += (token in "{[") - (token in "}]")
                # A closing bracket ends what it opened; a comma or a bracket of the list around ends anything else.
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
                text = "nested too deeply or torn" if isinstance(error, RecursionError) else str(error)
                return "", Damage("torn-record", f"not JSON ({text}); the file ends inside the record; fetch it again")

    def _resume(self, end: int) -> int:
        """Where reading goes on behind a damaged value, or 0 if that is not known yet.

        Args:
            end: Where its brackets end, from its beginning; 0: they do not. Where a bracket or a quotation mark is
                missing, that is wrong.
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
        """The next comma before an object with more than half the keys of the first record, in the text at hand."""
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
        """Steps to where a record seems to begin; whether there is such a place.

        Args:
            character: What stands here, or stood before.
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
        """Appends a chunk, at least as long as what is kept, so that a long record is parsed a few times at most."""
        if self._ended:
            return False
        kept = self._text[self._at :]
        raw = self._file.read(max(CHUNK_BYTES, len(kept)))
        self.num_bytes += len(raw)
        self._ended = not raw
        self._text, self._at = kept + self._decode(raw, final=not raw), 0
        return bool(raw)
