"""Every kind of problem that data can have: a stable code, what it means, what to do. All stages use these.

Levels: `bad` records cannot be used and count towards `data.max_bad_share`; `left out` records are sound but hold
nothing to learn from; a `note` is worth a look, and the record is used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["bad", "left out", "note"]


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """One kind: `code` never changes its meaning; lists and scripts may rely on it."""

    code: str
    level: Level
    meaning: str
    fix: str


_KINDS: tuple[tuple[str, Level, str, str], ...] = (
    # Syntax
    ("not-json", "bad", "the record is not JSON", "write one object a line, or one JSON list"),
    ("nan", "bad", "NaN or Infinity stands for a number", "write a finite number, or leave the field out"),
    ("invalid-utf8", "bad", "bytes that are not UTF-8", "convert the file with iconv"),
    ("torn-record", "bad", "the file ends inside the record", "fetch or write the file again"),
    ("nested-too-deeply", "bad", "brackets within brackets without end", "flatten the record"),
    ("too-large", "bad", "the record has more than 64 MiB of text", "look for a missing quotation mark before it"),
    ("not-an-object", "bad", "the record is a number, a text or a list", "write {...}"),
    ("wrong-columns", "bad", "another number of columns than the heading", "quote cells that hold the separator"),
    # Fields
    ("missing-field", "bad", "a required field is absent or null", "add the field"),
    ("wrong-type", "bad", "a field has another type than it should", "see the message"),
    ("invalid-id", "bad", "the id is neither text nor a whole number", "write text, or leave it out in a JSON list"),
    ("duplicate-id", "bad", "a group's id was used before", "give every group its own id"),
    ("empty-text", "bad", "a text is empty or holds only spaces", "remove the record or completion"),
    ("lone-surrogate", "bad", "half a surrogate pair, which no UTF-8 file can hold", "remove it"),
    ("unknown-role", "bad", "a turn of somebody else than system, user and assistant", "rename the role"),
    ("turn-order", "bad", "the prompt does not end with the user's turn", "end it with the user's turn"),
    ("image-parts", "bad", "image parts and images differ in number", "make them equal"),
    ("unknown-part", "bad", "a part of a turn is neither text nor the place of an image", "write text or image"),
    ("unknown-key", "bad", "a key in a turn, part or provenance that bpo does not know", "remove it"),
    ("few-completions", "bad", "fewer than two completions", "add one, or give the file as annotations"),
    ("invalid-score", "bad", "a score is not a finite number", "write a number; higher is preferred"),
    ("wrong-file", "bad", "groups where annotations are due, or the other way round", "name it by the other option"),
    ("rows-apart", "bad", "rows of one group stand apart or contradict each other", "sort the rows by group"),
    # Sound, but nothing to learn from
    ("text only", "left out", "there is no image", "none needed; data.text_only=keep trains on such groups"),
    ("no answer", "left out", "there is no answer, or an empty one", "none needed"),
    ("turns do not alternate", "left out", "user and assistant do not take turns", "merge neighbouring turns"),
    (
        "too-many-words",
        "left out",
        "a text is longer than data.max_completion_words",
        "none needed, or raise the limit",
    ),
    ("no-preference", "left out", "all completions have one score", "score them"),
    # Notes
    ("same-text", "note", "completions of different scores have one text", "remove one: there is nothing to learn"),
    ("unknown-field", "note", "a field that bpo does not read; it is kept and handed on", "none needed"),
    ("repeated-id", "note", "an annotation's id was used before; the second x becomes x#2", "none needed"),
    ("control-character", "note", "a control character in a text", "remove it: the model would learn to write it"),
    ("direction-mark", "note", "a mark that changes the direction of writing", "remove it where the text needs none"),
    ("special-token", "note", "a text spells a placeholder or a chat token; it is read as plain text", "none needed"),
    # Images
    ("image-no-path", "bad", "an image path is empty", "name a file relative to the image root"),
    ("image-url", "bad", "an image is a URL", "`bpo convert --fetch-urls` downloads it"),
    ("image-absolute", "bad", "an absolute image path outside the image root", "choose a higher root"),
    ("image-outside", "bad", "an image path leads out of the image root", "copy the file below the root"),
    ("image-bad-path", "bad", "no file system takes the path", "rename the file"),
    ("image-missing", "bad", "there is no such file", "check the image root"),
    ("image-no-file", "bad", "a folder, pipe or device", "name the image in it"),
    ("image-empty", "bad", "0 bytes", "fetch it again"),
    ("image-unreadable", "bad", "the file cannot be opened", "check its permissions"),
    ("image-too-large", "bad", "more pixels than bpo decodes", "scale it down"),
    ("image-undecodable", "bad", "truncated, damaged, or no image at all", "fetch it again"),
    ("image-refused", "bad", "the model's image processor refuses it", "crop or scale it"),
    ("image-embedded", "bad", "the image stands in the file itself", "`bpo convert` writes it to a folder"),
    ("image-extension", "note", "the file's name says another format than its content", "none needed"),
    ("image-shape", "note", "one side is 100 times the other or more", "crop it: some models refuse such a shape"),
)
PROBLEMS: dict[str, ProblemKind] = {kind[0]: ProblemKind(*kind) for kind in _KINDS}


class RecordError(ValueError):
    """A record that cannot be used. The message names file, record, field and fix.

    Attributes:
        code: One of `PROBLEMS`.
        record_id: The record's id, where it was read before the error.
    """

    record_id: str | None = None

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        return type(self), (self.code, str(self))  # worker processes send it


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of one record.

    Attributes:
        code: One of `PROBLEMS`.
        where: File and line or position.
        record_id: Its id, where it could be read.
        detail: The message.
    """

    code: str
    where: str
    record_id: str | None
    detail: str

    @property
    def level(self) -> Level:
        return PROBLEMS[self.code].level

    def to_json(self) -> dict[str, str | None]:
        return {"where": self.where, "record": self.record_id, "code": self.code, "error": self.detail}
