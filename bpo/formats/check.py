"""`bpo check DATA`: checks every record and image in parallel, prints a table of problems and lists bad records."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from bpo.config.training import DataConfig
from bpo.formats.bad_records import BadRecords, TooManyBadRecords, share
from bpo.formats.examine import Examination, Findings, examine, forget_images, why_unused
from bpo.formats.importers.preferences import PairRow
from bpo.formats.importers.registry import SCHEMAS, Schema, Source, open_source
from bpo.formats.jsonfiles import Piece
from bpo.formats.problems import PROBLEMS, Problem
from bpo.formats.reading import RowGroups, SeenIds
from bpo.job.durable import replacing
from bpo.job.journal import to_line
from bpo.job.terminal import printable
from bpo.records import PreferenceGroup

MAX_EXAMPLES = 3
BATCH_RECORDS = 1000
BATCH_BYTES = 4 << 20
_LEVELS = ("bad", "left out", "note")


class Measuring(Protocol):
    """Measures what passes through a check."""

    def add(self, schema: Schema, piece: Piece) -> None:
        """Takes a record before it is examined."""

    def lines(self) -> list[str]:
        """The result, for the terminal."""


@dataclass
class CheckResult:
    """Result of a check.

    Attributes:
        schema: Name of the record schema.
        num_records: Number of records read.
        num_bad: Number of records with a problem of level `bad`.
        counts: Problem code -> number of records.
        examples: Problem code -> first messages.
        opens_images: Whether images were decoded.
        num_trained: Number of groups that training would use, as far as this is known without the model.
        unused: Reason -> number of records or groups that training would not use.
        seconds: Wall-clock time.
    """

    path: str
    schema: str
    gives: str
    num_records: int = 0
    num_bad: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    opens_images: bool = True
    num_trained: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, problems: Sequence[Problem]) -> None:
        """Adds the problems of one record."""
        self.num_bad += any(problem.level == "bad" for problem in problems)
        self.counts.update({problem.code for problem in problems})
        for problem in problems:
            examples = self.examples.setdefault(problem.code, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(problem.detail)

    def table(self) -> str:
        """Returns a readable table of the problems, most severe level first, with examples and fixes."""
        head = f"{self.path}: {self.num_records:,} records ({self.schema}, {self.gives}) in {self.seconds:.1f} s"
        usable = self.num_records - self.num_bad
        lines = [f"{head}; {usable:,} usable, {self.num_bad:,} bad"]
        if self.gives == "groups":
            lines += self._training()
        order = sorted(self.counts, key=lambda code: (_LEVELS.index(PROBLEMS[code].level), -self.counts[code], code))
        for code in order:
            kind = PROBLEMS[code]
            lines.append(f"{self.counts[code]:>10,}  {kind.level:<8}  {code}: {kind.meaning}. Fix: {kind.fix}")
            lines += [f"{'':>22}{_one_line(detail)}" for detail in self.examples[code]]
        return "\n".join(lines)

    def use(self, unused: str | None) -> None:
        """Counts one record or group as trained on, or as unused for a reason."""
        self.num_trained += unused is None
        if unused is not None:
            self.unused[unused] += 1

    def _training(self) -> Iterator[str]:
        hints = {"no-image": "data.text_only=keep", "image-embedded": PROBLEMS["image-embedded"].fix}
        reasons = [
            f"{count:,} {reason}" + (f" ({hints[reason]})" if reason in hints else "")
            for reason, count in self.unused.most_common()
        ]
        total = self.num_trained + self.unused.total()
        unused = f"; not: {', '.join(reasons)}" if reasons else ""
        unknown = "their prompts fit the model" if self.opens_images else "their prompts fit and their images are good"
        yield f"bpo train would use {self.num_trained:,} of {total:,} groups (if {unknown}){unused}"
        bad = {code for code in self.unused if code in PROBLEMS and PROBLEMS[code].level == "bad"}
        try:
            limit = BadRecords("quarantine", DataConfig.max_bad_share)
            num_bad = sum(self.unused[code] for code in bad)
            limit.check_share(self.num_records, "bpo train stops", num_bad, "see below")
        except TooManyBadRecords as stop:
            yield str(stop)


def check_data(
    path: Path,
    *,
    image_root: Path = Path("."),
    opens_images: bool = True,
    schema: str = "",
    max_words: int = DataConfig.max_completion_words,
    keep_text_only: bool = False,
    types: Sequence[str] = (),
    workers: int = 1,
    quarantine: IO[bytes] | None = None,
    progress: bool = False,
    measuring: Measuring | None = None,
) -> CheckResult:
    """Checks every record in constant memory, plus 16 to 32 bytes per id and the labelled rows (KTO).

    Args:
        keep_text_only: Whether `data.text_only` is `keep`.
        types: Value of `train.completion_types`.
        workers: Number of worker processes; 1 runs in the calling process.
        quarantine: File that receives one JSON line per problem of a bad record.
        measuring: Receives every record of a file of groups.

    Raises:
        ValueError: The file cannot be read, has an unknown format, or contains no records.
    """
    started = time.monotonic()
    source = open_source(path, schema)
    if source.schema is None:
        raise ValueError(f"{path}: the file contains no records")
    result = CheckResult(str(path), source.schema.name, source.schema.gives, opens_images=opens_images)
    what = Examination(source.schema.name, image_root, opens_images, max_words, keep_text_only, tuple(types))
    seen = SeenIds()
    merging = _Merging(result, what, seen, quarantine)
    forget_images()
    with _Progress(source, progress) as bar, _report_dead_worker(path):
        for batch, findings in _examined(_batches(_measured(source, measuring)), what, workers):
            for index, record_id in enumerate(findings.ids):
                problems = findings.problems.get(index, [])
                unused = findings.unused.get(index)
                row = findings.rows.get(index)
                if row is not None:
                    merging.add(row, findings.places[index], unused)
                else:
                    if record_id is not None:
                        repeated = [*_repeated(seen, source, record_id, findings.places[index])]
                        problems = [*problems, *repeated]
                        unused = unused or next((p.code for p in repeated if p.level == "bad"), None)
                    result.use(unused)
                _add(result, problems, quarantine)
            result.num_records += len(findings.ids)
            bar.update(batch)
        merging.finish()
    result.seconds = time.monotonic() - started
    return result


def _measured(source: Source, measuring: Measuring | None) -> Iterator[Piece]:
    for piece in source.container.pieces():
        if measuring is not None and source.schema is not None and source.schema.gives == "groups":
            measuring.add(source.schema, piece)
        yield piece


def _repeated(seen: SeenIds, source: Source, record_id: str, where: str) -> Iterator[Problem]:
    if seen.add(record_id):
        return
    code = "duplicate-id" if source.schema is not None and source.schema.unique_ids else "repeated-id"
    yield Problem(code, where, record_id, f"{where}: id {record_id!r} is already used by an earlier record")


class _Merging:
    """Merges groups stored in several rows, and counts them as training would use them."""

    def __init__(self, result: CheckResult, what: Examination, seen: SeenIds, quarantine: IO[bytes] | None):
        self._result, self._what, self._quarantine = result, what, quarantine
        self._groups = RowGroups(seen)
        self._unused: dict[str, str] = {}  # group -> why training does not use one of its rows

    def add(self, row: PairRow, where: str, unused: str | None) -> None:
        self._count(self._groups.add(row, where))
        if unused:
            self._unused.setdefault(row.group.id, unused)

    def finish(self) -> None:
        self._count(self._groups.finish())

    def _count(self, merged: Iterable[PreferenceGroup | Problem]) -> None:
        for group in merged:
            if isinstance(group, Problem):
                self._result.use(self._unused.pop(str(group.record_id), group.code))
                _add(self._result, [group], self._quarantine)
            else:
                self._result.use(self._unused.pop(group.id, None) or why_unused(group, self._what))


def _add(result: CheckResult, problems: Sequence[Problem], quarantine: IO[bytes] | None) -> None:
    if problems:
        result.add(problems)
    for problem in problems:
        if quarantine is not None and problem.level == "bad":
            # ASCII: an id may contain a lone surrogate.
            quarantine.write(to_line(problem.to_json()))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        batch.append(piece)
        num_bytes += len(piece.source) if isinstance(piece.source, (str, bytes)) else _size_of(piece.source)
        if len(batch) >= BATCH_RECORDS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _size_of(value: Any) -> int:
    """Returns the approximate size in bytes of a table row, which may contain images."""
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    if isinstance(value, list):
        return sum(map(_size_of, value))
    return len(value) if isinstance(value, (str, bytes)) else 8


def _examined(batches: Iterator[list[Piece]], what: Examination, workers: int) -> Iterator[tuple[Piece, Findings]]:
    """Yields (last piece, findings) of every batch in order, with up to 2 * `workers` batches in flight."""
    if workers <= 1:
        yield from ((batch[-1], examine(batch, what)) for batch in batches)
        return
    # spawn: progress bars start threads, and forking a multi-threaded process may deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: deque[tuple[Piece, Future[Findings]]] = deque()
        for batch in batches:
            pending.append((batch[-1], pool.submit(examine, batch, what)))
            if len(pending) > 2 * workers:
                last, future = pending.popleft()
                yield last, future.result()
        while pending:
            last, future = pending.popleft()
            yield last, future.result()


@contextmanager
def _report_dead_worker(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(
            f"{path}: a worker process died (out of memory, or a crash in an image decoder); try fewer --workers, or "
            "--no-images"
        ) from error


class _Progress:
    """Progress bar: in bytes for JSON files, in records otherwise."""

    def __init__(self, source: Source, shown: bool):
        self._in_bytes = source.container.kind in ("list", "jsonl")
        total = source.container.size_bytes if self._in_bytes else None
        unit = "B" if self._in_bytes else "record"
        self._bar = tqdm(total=total, unit=unit, unit_scale=True, desc="checking", disable=not shown)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, last: Piece) -> None:
        self._bar.update((last.end_bytes if self._in_bytes else last.index + 1) - self._bar.n)


def _one_line(text: str) -> str:
    """Returns a message, which may quote untrusted data, as one printable line of at most 220 characters."""
    line = printable(text.replace("\n", "\\n"))
    return line if len(line) <= 220 else f"{line[:217]}..."


def main(argv: list[str], measure: Callable[[], Measuring] | None = None) -> int:
    """Runs the command; returns 1 if more records are bad than --max-bad-share allows or no group is trained on.

    Args:
        measure: Creates what measures groups, unless --no-measure is given.
    """
    parser = argparse.ArgumentParser(prog="bpo check", description=__doc__)
    data_help = "annotations or groups in any supported format: a file or a folder of shards"
    parser.add_argument("data", type=Path, metavar="DATA", help=data_help)
    parser.add_argument("--image-root", type=Path, default=Path("."), help="base folder of relative image paths")
    parser.add_argument("--no-images", action="store_true", help="do not open images")
    names = ", ".join(schema.name for schema in SCHEMAS)
    parser.add_argument("--from", dest="schema", default="", help=f"record schema (default: detected), one of {names}")
    parser.add_argument("--max-words", type=int, default=DataConfig.max_completion_words, help="words per completion")
    parser.add_argument("--text-only", choices=["drop", "keep"], default="drop", help="data.text_only of the training")
    parser.add_argument("--types", nargs="+", default=(), help="train.completion_types of the training (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--max-bad-share", type=share, default=0.0, help="fraction of bad records to tolerate")
    parser.add_argument("--quarantine", type=Path, help="list of bad records (default: DATA.quarantine.jsonl)")
    parser.add_argument("--no-measure", action="store_true", help="do not measure what the texts of groups give away")
    parser.add_argument("--json", type=Path, help="also write counts and examples to this file")
    args = parser.parse_args(argv)
    measuring = None if measure is None or args.no_measure else measure()
    named = args.data if args.data.name not in ("", "..") else args.data.resolve()
    quarantine = args.quarantine or named.with_name(f"{named.name}.quarantine.jsonl")
    if not named.parent.is_dir():
        open_source(args.data, args.schema)  # a missing file is named first, not the list next to it
    try:
        with replacing(quarantine, sync=False) as file:
            result = check_data(
                args.data,
                image_root=args.image_root,
                opens_images=not args.no_images,
                schema=args.schema,
                max_words=args.max_words,
                keep_text_only=args.text_only == "keep",
                types=args.types,
                workers=args.workers,
                quarantine=file,
                progress=True,
                measuring=measuring,
            )
    except OSError as error:
        raise ValueError(
            f"{quarantine} cannot be written ({error.strerror}); choose another path with --quarantine"
        ) from error
    print(printable(result.table()))
    if result.num_bad:
        print(printable(f"Bad records are listed in {quarantine}"))
    for line in measuring.lines() if measuring is not None else ():
        print(printable(line))
    if args.json:
        try:
            args.json.write_text(json.dumps(vars(result), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{args.json}: {error.strerror}; choose another path with --json") from error
    is_useless = result.gives == "groups" and not result.num_trained
    return int(is_useless or result.num_bad > args.max_bad_share * result.num_records)
