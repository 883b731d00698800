"""Streams records from any supported file under a common policy for bad records."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bpo.formats.bad_records import BadRecords
from bpo.formats.embedded import plain_images
from bpo.formats.fields import id_text
from bpo.formats.importers.names import canonical
from bpo.formats.importers.preferences import PairRow, merge_rows
from bpo.formats.importers.registry import Outcome, Schema, Source, form_of
from bpo.formats.jsonfiles import Piece
from bpo.formats.markers import refuse_marked_answer
from bpo.formats.messages import lift_images, refuse_other_media
from bpo.formats.problems import PROBLEMS, Problem, RecordError
from bpo.records import Annotation, Completion, PreferenceGroup, Turn

# (record, where) -> the record with embedded images replaced by paths.
TakeImages = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


class SeenIds:
    """Compact set of ids, 16 to 32 bytes per id: a table of 64-bit digests with open addressing.

    The probability that two of a million ids share a digest is 3e-8.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))
        self._count = 0
        self._uses: dict[str, int] = {}

    def add(self, record_id: str) -> bool:
        """Adds an id; returns whether it is new."""
        if 2 * (self._count + 1) > len(self._slots):
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for digest in old:
                if digest:
                    self._insert(digest)
        raw = hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        is_new = self._insert(int.from_bytes(raw, "little") or 1)  # 0 denotes an empty slot
        self._count += is_new
        return is_new

    def unused(self, record_id: str) -> str:
        """Adds and returns the id, or `id#2`, `id#3` ... if it is already used."""
        unused = record_id
        while not self.add(unused):
            self._uses[record_id] = self._uses.get(record_id, 1) + 1
            unused = f"{record_id}#{self._uses[record_id]}"
        return unused

    def _insert(self, digest: int) -> bool:
        mask = len(self._slots) - 1
        slot = digest & mask
        while found := self._slots[slot]:
            if found == digest:
                return False
            slot = (slot + 1) & mask
        self._slots[slot] = digest
        return True


def record_id_of(schema: Schema, value: Mapping[str, Any], piece: Piece) -> str:
    """Returns the id of a record, or one derived from its position.

    Raises:
        RecordError: The id is invalid, or missing although the schema requires one.
    """
    found = next((value[key] for key in schema.id_keys if value.get(key) is not None), None)
    if found is not None:
        return id_text(found, piece.where)
    if schema.unique_ids:
        raise RecordError("missing-field", f"{piece.where}: field 'id' is missing; give every group a unique id")
    return f"record-{piece.index}"


def adapt(schema: Schema, piece: Piece, take_images: TakeImages | None = None) -> tuple[str, Outcome]:
    """Parses one piece; returns its id and the adapted record, in which line breaks are LF.

    Raises:
        RecordError: Names the file, record, field and fix.
    """
    value: Mapping[str, Any] = piece.parse()
    record_id = record_id_of(schema, value, piece)
    where = piece.where if schema.unique_ids else f"{piece.where} (id {record_id!r})"
    try:
        fields = canonical(value)
        refuse_other_media(fields, where)
        schema = form_of(schema, value, fields, where)
        value = plain_images(lift_images(fields, piece.where))
        if take_images is not None:
            value = take_images(value, piece.where)
        return record_id, _checked(schema.adapt(value, record_id, where), where)
    except RecordError as error:
        if PROBLEMS[error.code].level == "left out":
            return record_id, error.code
        error.record_id = record_id
        raise


def _checked(outcome: Outcome, where: str) -> Outcome:
    """Returns the outcome with CRLF as LF; raises RecordError if an answer contains a marker."""
    if isinstance(outcome, str):
        return outcome
    record = outcome.group if isinstance(outcome, PairRow) else outcome
    if isinstance(record, Annotation):
        answers, prompts = [record.response], [record.prompt]
    else:
        answers = [completion.response for completion in record.completions]
        answers += [entry.response for entry in record.auxiliary]
        prompts = [record.prompt, *(entry.prompt for entry in record.auxiliary)]
    refuse_marked_answer(answers, where)
    if not any("\r\n" in text for text in [*answers, *(turn.text for prompt in prompts for turn in prompt)]):
        return outcome
    if isinstance(record, Annotation):
        return replace(record, prompt=_with_lf(record.prompt), response=_lf(record.response))
    group = replace(
        record,
        prompt=_with_lf(record.prompt),
        completions=tuple(map(_completion_with_lf, record.completions)),
        auxiliary=tuple(replace(a, prompt=_with_lf(a.prompt), response=_lf(a.response)) for a in record.auxiliary),
    )
    return replace(outcome, group=group) if isinstance(outcome, PairRow) else group


def _completion_with_lf(completion: Completion) -> Completion:
    """Returns the completion with CRLF as LF; its spans keep their characters, except for removed ones."""
    text = completion.response
    moved = [(_lf_length(text, start), _lf_length(text, end), w) for start, end, w in completion.token_weights]
    spans = tuple(span for span in moved if span[0] < span[1])
    return replace(completion, response=_lf(text), token_weights=spans)


def _lf_length(text: str, end: int) -> int:
    """Returns the length of the first `end` characters once every CR before an LF is removed."""
    return end - text.count("\r\n", 0, end + 1)


def _with_lf(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(replace(turn, content=tuple(replace(p, text=_lf(p.text)) for p in turn.content)) for turn in prompt)


def _lf(text: str) -> str:
    return text.replace("\r\n", "\n")


def iterate_records(
    source: Source,
    bad: BadRecords,
    *,
    left_out: Callable[[str, str], None] | None = None,
    take_images: TakeImages | None = None,
    seen_piece: Callable[[Piece], None] | None = None,
) -> Iterator[Annotation | PreferenceGroup]:
    """Yields the usable records in order, with unique ids; bad records are reported to `bad`.

    Args:
        left_out: Called with the reason and id of each record without a training signal.
        take_images: See `TakeImages`.
        seen_piece: Called with every piece, for progress.

    Raises:
        RecordError: `bad.on_bad` is "error" and a record is bad.
        TooManyBadRecords: More records are bad than `bad.max_bad_share` allows; raised at the end.
    """
    if source.schema is None:
        return
    schema, seen, num_records = source.schema, SeenIds(), 0
    groups = RowGroups(seen)
    for piece in source.container.pieces():
        num_records += 1
        if seen_piece is not None:
            seen_piece(piece)
        record_id: str | None = None
        try:
            record_id, outcome = adapt(schema, piece, take_images)
            if isinstance(outcome, PairRow):
                yield from _without_problems(groups.add(outcome, piece.where), bad)
            elif isinstance(outcome, str):
                if left_out is not None:
                    left_out(outcome, seen.unused(record_id))
            elif not schema.unique_ids:
                unused = seen.unused(record_id)
                yield outcome if outcome.id == unused else replace(outcome, id=unused)
            elif seen.add(outcome.id):
                yield outcome
            else:
                message = f"{piece.where}: id {outcome.id!r} is used twice; give every group a unique id"
                raise RecordError("duplicate-id", message)
        except RecordError as error:
            bad.report(Problem(error.code, piece.where, error.record_id or record_id, str(error)))
    yield from _without_problems(groups.finish(), bad)
    bad.check_share(num_records, ", ".join(str(path) for path in source.container.paths[:3]))


def _without_problems(outcomes: Iterator[PreferenceGroup | Problem], bad: BadRecords) -> Iterator[PreferenceGroup]:
    for outcome in outcomes:
        if isinstance(outcome, Problem):
            bad.report(outcome)
        else:
            yield outcome


class RowGroups:
    """Merges the rows of groups that are stored in several rows.

    Labelled rows (KTO) of one prompt may be anywhere in the file, so they are kept until its end; the rows of any other
    group are adjacent.

    Args:
        seen: Receives the ids of the groups.
    """

    def __init__(self, seen: SeenIds):
        self._seen = seen
        self._rows: list[PairRow] = []
        self._where = ""
        self._labelled: dict[str, tuple[str, list[PairRow]]] = {}

    def add(self, row: PairRow, where: str) -> Iterator[PreferenceGroup | Problem]:
        """Yields the group that ends before this row, or why it cannot be used."""
        if row.is_labelled:
            self._labelled.setdefault(row.group.id, (where, []))[1].append(row)
            return
        if self._rows and self._rows[0].group.id != row.group.id:
            yield self._merged(self._rows, self._where)
            self._rows = []
        self._rows.append(row)
        self._where = where

    def finish(self) -> Iterator[PreferenceGroup | Problem]:
        """Yields the groups that are left at the end of the file."""
        if self._rows:
            yield self._merged(self._rows, self._where)
        while self._labelled:
            where, rows = self._labelled.pop(next(iter(self._labelled)))
            yield self._merged(rows, where)

    def _merged(self, rows: Sequence[PairRow], where: str) -> PreferenceGroup | Problem:
        try:
            group = merge_rows(rows, where)
            if not self._seen.add(group.id):
                message = f"{where}: rows of group {group.id!r} are not adjacent; sort by group"
                raise RecordError("rows-apart", message)
        except RecordError as error:
            return Problem(error.code, where, rows[0].group.id, str(error))
        return group
