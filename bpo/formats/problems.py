"""Catalogue of data problems, shared by all stages: a stable code, its meaning and the fix.

Levels: `bad` records cannot be used and count towards `data.max_bad_share`; `left out` records are valid but have no
training signal; a `note` is informational, and the record is used as is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["bad", "left out", "note"]


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """One kind of problem. The meaning of `code` is stable, so scripts may rely on it."""

    code: str
    level: Level
    meaning: str
    fix: str


_KINDS: tuple[tuple[str, Level, str, str], ...] = (
    # Syntax
    ("not-json", "bad", "the record is not JSON", "write one object per line, or one JSON list"),
    ("nan", "bad", "a number is NaN or Infinity", "write a finite number, or omit the field"),
    ("invalid-utf8", "bad", "bytes that are not UTF-8", "convert the file with iconv"),
    ("torn-record", "bad", "the file ends inside the record", "download or write the file again"),
    ("nested-too-deeply", "bad", "the JSON is nested too deeply", "flatten the record"),
    ("too-large", "bad", "the record has more than 64 MiB of text", "look for a missing quotation mark before it"),
    ("not-an-object", "bad", "the record is a number, a text or a list", "write {...}"),
    ("wrong-columns", "bad", "the number of columns differs from the header", "quote cells that contain the separator"),
    # Fields
    ("missing-field", "bad", "a required field is absent or null", "add the field"),
    ("wrong-type", "bad", "a field has the wrong type", "see the message"),
    ("invalid-id", "bad", "the id is neither text nor an integer", "write text, or omit the id in a JSON list"),
    ("duplicate-id", "bad", "a group's id is not unique", "give every group a unique id"),
    ("empty-text", "bad", "a text is empty or contains only spaces", "remove the record or completion"),
    ("lone-surrogate", "bad", "a lone surrogate, which UTF-8 cannot encode", "remove it"),
    ("unknown-role", "bad", "a turn's role is not system, user or assistant", "rename the role"),
    ("turn-order", "bad", "the prompt does not end with a user turn", "end it with a user turn"),
    ("image-parts", "bad", "the numbers of image parts or markers and of images differ", "make them equal"),
    ("foreign-marker", "bad", "a prompt has another tool's image marker", "write <image>, and the file in 'images'"),
    ("rendered-prompt", "bad", "a chat template has already rendered the prompt", "write the question alone"),
    ("unknown-part", "bad", "a part of a turn is neither text nor an image", "write text or image"),
    ("unknown-key", "bad", "an unknown key in a turn, part, provenance or auxiliary entry", "remove it"),
    ("few-completions", "bad", "fewer than two completions", "add one, or use the file as annotations"),
    ("invalid-score", "bad", "a score is not a finite number", "write a number; higher is preferred"),
    ("invalid-weight", "bad", "a weight is not a number from 0 to 1e6", "write a number; 1 is the default"),
    ("invalid-beta", "bad", "a beta is not a number above 0, up to 1e6", "write a number; 1 is the default"),
    (
        "invalid-weights",
        "bad",
        "the weights of an answer's characters are malformed",
        "write ascending [start, end, weight] within the answer",
    ),
    ("invalid-flag", "bad", "paired or explored is not true or false, or of other images", "write true or false"),
    ("invalid-view", "bad", "an answer describes a view that the group lacks", 'write "other", and other_images'),
    ("other-images", "bad", "the numbers of images and of other_images differ", "make them equal"),
    ("wrong-file", "bad", "groups instead of annotations, or vice versa", "set it as data.groups or data.annotations"),
    ("preference-field", "bad", "an annotation has a field of preference data", "name the answers chosen and rejected"),
    ("different-prompts", "bad", "the answers have different prompts or images", "give them the same ones"),
    ("one-label", "bad", "all answers to a prompt have the same label", "leave the prompt out"),
    ("rows-apart", "bad", "rows of a group are not adjacent or contradict each other", "sort the rows by group"),
    # Valid, but without a training signal
    ("text only", "left out", "the record has no image", "none needed; data.text_only=keep trains on such groups"),
    ("no answer", "left out", "the answer is missing or empty", "none needed"),
    ("other-media", "left out", "the record has a video or audio", "none needed; bpo trains on images only"),
    ("marker-in-answer", "left out", "an answer has a marker of an image, video or box", "none needed"),
    ("turns do not alternate", "left out", "user and assistant turns do not alternate", "merge neighbouring turns"),
    (
        "too-many-words",
        "left out",
        "a text is longer than data.max_completion_words",
        "none needed, or raise the limit",
    ),
    ("no-preference", "left out", "all completions have the same score", "score them"),
    # Notes
    ("same-text", "note", "completions with different scores have the same text", "remove one; it has no signal"),
    ("unknown-field", "note", "a field that bpo does not use; it is kept", "none needed"),
    ("repeated-id", "note", "an id is not unique; the second x becomes x#2", "none needed"),
    ("control-character", "note", "a control character in a text", "remove it, or the model may learn to generate it"),
    ("direction-mark", "note", "a text direction mark (bidirectional control)", "remove it if the text needs none"),
    ("special-token", "note", "a text contains a placeholder or chat token; it is read as plain text", "none needed"),
    # Images
    ("image-no-path", "bad", "an image path is empty", "write a path relative to the image root"),
    ("image-url", "bad", "an image is a URL", "download it with `bpo convert --fetch-urls`"),
    (
        "image-scheme",
        "bad",
        "an image is at a storage that bpo does not read (s3://, gs://, ...)",
        "copy the files below the image root and write their paths",
    ),
    ("image-absolute", "bad", "an absolute image path outside the image root", "set a higher root"),
    ("image-outside", "bad", "an image path leads out of the image root", "copy the file below the root"),
    ("image-bad-path", "bad", "the path is invalid on this file system", "rename the file"),
    ("image-missing", "bad", "the file does not exist", "check the image root"),
    ("image-no-file", "bad", "the path is a folder, pipe or device", "write the path of the image file"),
    ("image-empty", "bad", "the file is empty (0 bytes)", "download it again"),
    ("image-unreadable", "bad", "the file cannot be opened", "check its permissions"),
    ("image-too-large", "bad", "the image has too many pixels", "scale it down"),
    ("image-undecodable", "bad", "the file is truncated, damaged or not an image", "download it again"),
    ("image-refused", "bad", "the model's image processor rejects the image", "crop or scale it"),
    ("image-embedded", "bad", "the image is embedded in the file", "extract it with `bpo convert --images`"),
    ("image-extension", "note", "the file extension does not match the content", "none needed"),
    ("image-shape", "note", "one side is at least 100 times the other", "crop it; some models reject such shapes"),
)
PROBLEMS: dict[str, ProblemKind] = {kind[0]: ProblemKind(*kind) for kind in _KINDS}


class RecordError(ValueError):
    """An unusable record. The message names the file, record, field and fix.

    Attributes:
        code: A key of `PROBLEMS`.
        record_id: Id of the record, if it was read before the error.
    """

    record_id: str | None = None

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        return type(self), (self.code, str(self))  # pickled by worker processes


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of one record.

    Attributes:
        code: A key of `PROBLEMS`.
        where: File and line or position.
        record_id: Id of the record, if readable.
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
