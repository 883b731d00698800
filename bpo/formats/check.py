"""`bpo check DATA`: reads every record and image in parallel, prints a table of problems, lists the bad records."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from bpo.config.training import DataConfig
from bpo.formats.bad_records import share
from bpo.formats.examine import Examination, Findings, examine, forget_images
from bpo.formats.importers.registry import SCHEMAS, Source, open_source
from bpo.formats.jsonfiles import Piece
from bpo.formats.problems import PROBLEMS, Problem
from bpo.formats.reading import SeenIds

MAX_EXAMPLES = 3
BATCH_RECORDS = 1000
BATCH_BYTES = 4 << 20
_LEVELS = ("bad", "left out", "note")


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        schema: Name of the schema of the records.
        num_records: All of them.
        num_bad: Records with a problem of level `bad`.
        counts: Code -> records with it.
        examples: Code -> the first messages.
        seconds: Wall-clock time.
    """

    path: str
    schema: str
    gives: str
    num_records: int = 0
    num_bad: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, problems: Sequence[Problem]) -> None:
        """Takes the problems of one record."""
        self.num_bad += any(problem.level == "bad" for problem in problems)
        self.counts.update({problem.code for problem in problems})
        for problem in problems:
            examples = self.examples.setdefault(problem.code, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(problem.detail)

    def table(self) -> str:
        """The problems for people: the worst level first, each with examples and the fix."""
        head = f"{self.path}: {self.num_records:,} records ({self.schema}, {self.gives}) in {self.seconds:.1f} s"
        usable = self.num_records - self.num_bad
        lines = [f"{head}; {usable:,} usable, {self.num_bad:,} bad"]
        order = sorted(self.counts, key=lambda code: (_LEVELS.index(PROBLEMS[code].level), -self.counts[code], code))
        for code in order:
            kind = PROBLEMS[code]
            lines.append(f"{self.counts[code]:>10,}  {kind.level:<8}  {code}: {kind.meaning}. To do: {kind.fix}")
            lines += [f"{'':>22}{_one_line(detail)}" for detail in self.examples[code]]
        return "\n".join(lines)


def check_data(
    path: Path,
    *,
    image_root: Path = Path("."),
    opens_images: bool = True,
    schema: str = "",
    max_words: int = DataConfig.max_completion_words,
    workers: int = 1,
    quarantine: IO[str] | None = None,
    progress: bool = False,
) -> CheckResult:
    """Examines every record; memory does not grow but for 16 to 32 bytes an id.

    Args:
        workers: Processes; 1 works in this one.
        quarantine: Takes one JSON line for every problem of a bad record.

    Raises:
        ValueError: The file cannot be read, its form is unknown, or there is no record in it.
    """
    started = time.monotonic()
    source = open_source(path, schema)
    if source.schema is None:
        raise ValueError(f"{path}: there is no record in it")
    result = CheckResult(str(path), source.schema.name, source.schema.gives)
    what = Examination(source.schema.name, image_root, opens_images, max_words)
    seen, last_id = SeenIds(), None
    forget_images()
    with _Progress(source, progress) as bar, _living_workers(path):
        for batch, findings in _examined(_batches(source.container.pieces()), what, workers):
            for index, record_id in enumerate(findings.ids):
                problems = findings.problems.get(index, [])
                if record_id is not None and not (findings.is_pair and record_id == last_id):
                    repeated = _repeated(seen, source, record_id, findings.places[index], findings.is_pair)
                    problems = [*problems, *repeated]
                    last_id = record_id
                if problems:
                    result.add(problems)
                    _write_bad(problems, quarantine)
            result.num_records += len(findings.ids)
            bar.update(batch)
    result.seconds = time.monotonic() - started
    return result


def _repeated(seen: SeenIds, source: Source, record_id: str, where: str, is_pair: bool) -> Iterator[Problem]:
    if seen.add(record_id):
        return
    unique = source.schema is not None and source.schema.unique_ids
    code = "rows-apart" if is_pair else "duplicate-id" if unique else "repeated-id"
    yield Problem(code, where, record_id, f"{where}: id {record_id!r} was used before")


def _write_bad(problems: Iterable[Problem], quarantine: IO[str] | None) -> None:
    for problem in problems:
        if quarantine is not None and problem.level == "bad":
            # ASCII: an id may hold half a surrogate pair.
            quarantine.write(json.dumps(problem.to_json()) + "\n")


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
    """About the bytes of a record from a table, which may hold images."""
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    if isinstance(value, list):
        return sum(map(_size_of, value))
    return len(value) if isinstance(value, (str, bytes)) else 8


def _examined(batches: Iterator[list[Piece]], what: Examination, workers: int) -> Iterator[tuple[Piece, Findings]]:
    """(last piece, findings) of every batch in order; a few batches are under way at a time."""
    if workers <= 1:
        yield from ((batch[-1], examine(batch, what)) for batch in batches)
        return
    # spawn: progress bars run threads, and a fork of a process with threads may deadlock.
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
def _living_workers(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(
            f"{path}: a worker process died, by lack of memory or in an image's decoder; try fewer --workers, or "
            "--no-images"
        ) from error


class _Progress:
    """A bar over the bytes of JSON, over the records of other files."""

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
    """A message as one printable line: it quotes other people's data."""
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return line if len(line) <= 220 else f"{line[:217]}..."


def main(argv: list[str]) -> int:
    """The command; exit status 1 where more records are bad than --max-bad-share allows."""
    parser = argparse.ArgumentParser(prog="bpo check", description=__doc__)
    data_help = "annotations or groups in any form that bpo reads; a folder of shards"
    parser.add_argument("data", type=Path, metavar="DATA", help=data_help)
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder that image paths are relative to")
    parser.add_argument("--no-images", action="store_true", help="do not open images")
    names = ", ".join(schema.name for schema in SCHEMAS)
    parser.add_argument("--from", dest="schema", default="", help=f"form of the records, if not found out: {names}")
    parser.add_argument("--max-words", type=int, default=DataConfig.max_completion_words, help="longest completion")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--max-bad-share", type=share, default=0.0, help="share of bad records that is no failure")
    parser.add_argument("--quarantine", type=Path, help="list of bad records; default: DATA.quarantine.jsonl")
    parser.add_argument("--json", type=Path, help="write counts and examples here, too")
    args = parser.parse_args(argv)
    named = args.data if args.data.name not in ("", "..") else args.data.resolve()
    quarantine = args.quarantine or named.with_name(f"{named.name}.quarantine.jsonl")
    part = quarantine.with_name(f"{quarantine.name}.part")
    try:
        with part.open("w", encoding="ascii") as file:
            result = check_data(
                args.data,
                image_root=args.image_root,
                opens_images=not args.no_images,
                schema=args.schema,
                max_words=args.max_words,
                workers=args.workers,
                quarantine=file,
                progress=True,
            )
        part.replace(quarantine)
    except OSError as error:
        raise ValueError(
            f"{quarantine} cannot be written ({error.strerror}); name another place by --quarantine"
        ) from error
    finally:
        with suppress(OSError):  # of a folder that may not be entered
            part.unlink(missing_ok=True)
    print(result.table())
    if result.num_bad:
        print(f"The bad records: {quarantine}")
    if args.json:
        try:
            args.json.write_text(json.dumps(vars(result), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{args.json}: {error.strerror}; name another place by --json") from error
    return int(result.num_bad > args.max_bad_share * result.num_records)
