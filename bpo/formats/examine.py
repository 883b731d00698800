"""Record checks of `bpo check`: all problems that reading, bootstrapping and training would report."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo.formats.embedded import take_embedded
from bpo.formats.images import ImageError, decode_image, read_image_file, resolve_image_path
from bpo.formats.importers.preferences import PairRow
from bpo.formats.importers.registry import SCHEMAS, Outcome, Schema
from bpo.formats.jsonfiles import Piece
from bpo.formats.markers import CHAT_TOKEN
from bpo.formats.problems import PROBLEMS, Problem, RecordError
from bpo.formats.reading import adapt
from bpo.formats.usable import NO_PAIR, distinct_answers, keep_types, refusal
from bpo.records import Annotation, PreferenceGroup

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Special tokens of the supported model families' chat templates and processors, and image markers of data files.
_SPECIAL = re.compile(
    CHAT_TOKEN + r"|</?s>|<(?:pad|unk|image|video|audio|img|IMG_CONTEXT|image_soft_token|fake_token_around_image"
    r"|start_of_image|end_of_image)>"
)
# An image shared by nearby records is opened only once.
_KEPT_IMAGES = 4096


@dataclass(frozen=True, slots=True)
class Examination:
    """Settings of a check.

    Attributes:
        schema: Name of the record schema.
        image_root: Base folder of the images.
        opens_images: Whether to decode every image.
        max_words: Value of `data.max_completion_words`.
        keep_text_only: Whether `data.text_only` is `keep`.
        types: Value of `train.completion_types`.
    """

    schema: str
    image_root: Path
    opens_images: bool
    max_words: int
    keep_text_only: bool = False
    types: tuple[str, ...] = ()


@dataclass
class Findings:
    """Findings about a batch of records, in order.

    Attributes:
        ids: Record ids; None if unreadable.
        places: Locations of the records (file and line or position).
        problems: Index in the batch -> problems.
        rows: Index in the batch -> the row, where a group is stored in several rows.
        unused: Index in the batch -> why training does not use the record, if it is not an annotation; of a row, only
            what is wrong with the row itself.
    """

    ids: list[str | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: dict[int, list[Problem]] = field(default_factory=dict)
    rows: dict[int, PairRow] = field(default_factory=dict)
    unused: dict[int, str] = field(default_factory=dict)


def examine(pieces: Sequence[Piece], what: Examination) -> Findings:
    """Parses and checks records; runs in worker processes."""
    schema = next(schema for schema in SCHEMAS if schema.name == what.schema)
    findings = Findings()
    for index, piece in enumerate(pieces):
        problems: list[Problem] = []
        record_id: str | None = None
        embedded = _Embedded(what.opens_images)
        try:
            record_id, outcome = adapt(schema, piece, embedded.take)
        except RecordError as error:
            problems.append(Problem(error.code, piece.where, error.record_id, str(error)))
            findings.unused[index] = error.code
        else:
            found = [*_of_record(outcome, what.max_words), *embedded.found]
            if what.opens_images:
                for image in _images_of(outcome):
                    found += _checked_file(what.image_root, image) if image not in embedded.names else []
            problems += [Problem(code, piece.where, record_id, f"{piece.where}: {detail}") for code, detail in found]
            if isinstance(outcome, PairRow):
                record_id, findings.rows[index] = outcome.group.id, outcome
            unused = next((problem.code for problem in problems if problem.level == "bad"), None)
            unused = unused or _not_extracted(schema, piece, embedded, what) or why_unused(outcome, what)
            if unused is not None:
                findings.unused[index] = unused
        findings.ids.append(record_id)
        findings.places.append(piece.where)
        if problems:
            findings.problems[index] = problems
    return findings


def _not_extracted(schema: Schema, piece: Piece, embedded: _Embedded, what: Examination) -> str | None:
    """Returns the code of the error with which training reads a record with embedded images."""
    if not embedded.names:
        return None
    try:
        for image in _images_of(adapt(schema, piece)[1]):
            resolve_image_path(what.image_root, image)
    except RecordError as error:
        return error.code
    return None


def why_unused(outcome: Outcome, what: Examination) -> str | None:
    """Returns why training does not use a group without errors, or None; also None for an annotation or a row."""
    if isinstance(outcome, str):
        return outcome
    if not isinstance(outcome, PreferenceGroup):
        return None
    group = keep_types(outcome, what.types)
    refused = refusal(group, max_words=what.max_words, keep_text_only=what.keep_text_only)
    if refused is None and distinct_answers(group.completions, lambda c: c.response) is None:
        refused = NO_PAIR
    return None if refused is None else refused[0]


class _Embedded:
    """Checks the images embedded in one record without writing them.

    Attributes:
        names: Names that replace the images in the record.
        found: (code, detail) of their problems.
    """

    def __init__(self, opens_images: bool):
        self._opens_images = opens_images
        self.names: set[str] = set()
        self.found: list[tuple[str, str]] = []

    def take(self, record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        return take_embedded(record, where, self._put)

    def _put(self, name: str | None, content: bytes, where: str) -> str:
        name = name or "in the record"
        self.names.add(name)
        if self._opens_images:
            self.found += _image_problems(name, content)
        return name


def _of_record(outcome: Outcome, max_words: int) -> Iterator[tuple[str, str]]:
    """Yields (code, detail) of the problems of a well-formed record."""
    if isinstance(outcome, str):
        yield outcome, PROBLEMS[outcome].meaning
        return
    is_row = isinstance(outcome, PairRow)
    record = outcome.group if isinstance(outcome, PairRow) else outcome
    if isinstance(record, Annotation):
        answers, extras = [record.response], [record.extra]
    else:
        answers = [completion.response for completion in record.completions]
        extras = [record.extra, *(completion.extra for completion in record.completions)]
        if len({c.score for c in record.own_completions}) < 2 and not is_row:
            yield "no-preference", "all completions have the same score"
        elif len({(c.view, c.response, c.score) for c in record.completions}) > len(
            {(c.view, c.response) for c in record.completions}
        ):
            yield "same-text", "completions with different scores have the same text"
    if not record.images:
        yield "text only", "the record has no image"
    for name in sorted({key for extra in extras for key in extra}):
        yield "unknown-field", f"field {name!r} is kept but not used"
    for answer in answers:
        if len(answer) > 2 * max_words and (num_words := len(answer.split())) > max_words:
            yield "too-many-words", f"{num_words} words; the limit is {max_words}"
            break
    others = record.auxiliary if isinstance(record, PreferenceGroup) else ()
    turns = [*record.prompt, *(turn for entry in others for turn in entry.prompt)]
    yield from _odd_texts([*answers, *(entry.response for entry in others), *(turn.text for turn in turns)])


def _odd_texts(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    # A regex search of every text costs more than parsing it, so filter with cheap tests first.
    unprintable = [text for text in texts if not text.isprintable()]
    bracketed = [text for text in texts if "<" in text or "[" in text]
    for code, pattern, suspects in (
        ("control-character", _CONTROL, unprintable),
        ("direction-mark", _DIRECTION, unprintable),
        ("special-token", _SPECIAL, bracketed),
    ):
        for text in suspects:
            if found := pattern.search(text):
                yield code, f"{found.group()!r} at {found.start()} in {text[max(0, found.start() - 20) :][:60]!r}"
                break


def _images_of(outcome: Outcome) -> tuple[str, ...]:
    if isinstance(outcome, str):
        return ()
    record = outcome.group if isinstance(outcome, PairRow) else outcome
    return (*record.images, *(record.other_images if isinstance(record, PreferenceGroup) else ()))


def forget_images() -> None:
    """Clears the cache of checked image files, which may have changed since."""
    _checked_file.cache_clear()


@functools.lru_cache(maxsize=_KEPT_IMAGES)
def _checked_file(root: Path, image: str) -> list[tuple[str, str]]:
    try:
        path = read_image_file(root, image)
    except ImageError as error:
        return [(error.code, str(error))]
    return _image_problems(image, path)


def _image_problems(name: str, source: Path | bytes) -> list[tuple[str, str]]:
    notes: list[str] = []
    try:
        decode_image(source, name, notes)
    except ImageError as error:
        return [(error.code, str(error))]
    return [(code, f"image {name!r}: {PROBLEMS[code].meaning}") for code in notes]
