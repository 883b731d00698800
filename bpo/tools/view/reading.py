"""Groups one at a time or as a sample, and the lines that belong to them, in memory that a long file does not fill."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bpo.config.training import DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.importers.registry import open_source
from bpo.formats.problems import Problem
from bpo.formats.reading import iterate_records
from bpo.records import PreferenceGroup

Entry = dict[str, Any]
# Bytes of the longest line read: as `bpo.data` bounds a record.
MAX_LINE_BYTES = 64 << 20


def iterate_groups(path: Path, bad: BadRecords) -> Iterator[PreferenceGroup]:
    """Every usable group of any file that holds groups, in order.

    Raises:
        ValueError: There is no record, or the file holds annotations; or see `iterate_records`.
    """
    source = open_source(path)
    if source.schema is None:
        raise ValueError(f"{path}: there is no record in it")
    if source.schema.gives != "groups":
        raise ValueError(
            f"{path} holds annotations ({source.schema.name}); run bpo bootstrap, which makes groups of them"
        )
    for record in iterate_records(source, bad):
        assert isinstance(record, PreferenceGroup)
        yield record


def sample(groups: Iterable[PreferenceGroup], limit: int) -> Iterator[PreferenceGroup]:
    """All groups as they come, or `limit` of them drawn at random, always the same, in the file's order.

    The drawing holds `limit` groups (algorithm R), however many there are.
    """
    if not limit:
        yield from groups
        return
    draw = random.Random(0)
    kept: list[tuple[int, PreferenceGroup]] = []
    for number, group in enumerate(groups):
        if number < limit:
            kept.append((number, group))
        elif (place := draw.randrange(number + 1)) < limit:
            kept[place] = (number, group)
    for _, group in sorted(kept, key=lambda one: one[0]):
        yield group


class LinesById:
    """The objects of a JSONL file by their `id`. Places are in memory; lines are read when they are asked for.

    Args:
        path: The file; None, or one that is not there, has no line.
        check: Raises KeyError, TypeError or ValueError for an object of another form.
        bad: Takes lines that cannot be used.
        advice: What to do about them.

    Raises:
        RecordError: `bad.on_bad` is error, and a line cannot be used.
    """

    def __init__(self, path: Path | None, check: Callable[[Entry], object], bad: BadRecords, advice: str):
        self.path = path
        self._places: dict[str, array[int]] = {}
        self.num_lines = 0
        if path is None or not path.exists():
            return
        offset = 0
        with path.open("rb") as file:
            for number in itertools.count(1):
                if not (line := file.readline(MAX_LINE_BYTES)):
                    break
                if line.strip():
                    self.num_lines += 1
                    self._take(line, f"{path}, line {number}", offset, check, bad, advice)
                offset += len(line)

    def _take(
        self, line: bytes, where: str, offset: int, check: Callable[[Entry], object], bad: BadRecords, advice: str
    ) -> None:
        try:
            entry = _parsed(line)
            check(entry)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            code = "missing-field" if isinstance(error, KeyError) else "not-json"
            bad.report(Problem(code, where, None, f"{where}: {what}; {advice}"))
        else:
            self._places.setdefault(str(entry["id"]), array("Q")).append(offset)

    def __iter__(self) -> Iterator[str]:
        """The ids, in the file's order."""
        return iter(self._places)

    def get(self, record_id: str) -> list[Entry]:
        """The objects of a record, in the file's order."""
        places = self._places.get(record_id)
        if not places or self.path is None:
            return []
        found = []
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place)
                found.append(_parsed(file.readline(MAX_LINE_BYTES)))
        return found


def _parsed(line: bytes) -> Entry:
    entry = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    json.dumps(entry, ensure_ascii=False).encode("utf-8")  # half a surrogate pair has no place in a page
    return entry


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} stands for a number")


def write_bad(path: Path, bad: BadRecords) -> None:
    """Lists bad records as `bpo convert` does; removes an older list where there is none."""
    if not bad.problems:
        path.unlink(missing_ok=True)
        return
    path.write_text("".join(json.dumps(problem.to_json()) + "\n" for problem in bad.problems), encoding="ascii")


def add_bad_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of bad records, as for every stage."""
    default, share = DataConfig.on_bad, DataConfig.max_bad_share
    parser.add_argument(
        "--on-bad",
        choices=["quarantine", "error"],
        default=default,
        help="what becomes of bad records: left out and listed, or the first one ends it (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=share, help="largest share of bad records (default: %(default)s)"
    )


def bad_of(chosen: argparse.Namespace) -> BadRecords:
    """The policy that the options of `add_bad_options` ask for.

    Raises:
        ValueError: The share is none.
    """
    if not 0 <= chosen.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share is {chosen.max_bad_share:g}; give a share from 0 to 1")
    return BadRecords(chosen.on_bad, chosen.max_bad_share)
