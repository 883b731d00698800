"""Reading groups files in `bpo view` and `bpo score`: sampling, bad records."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from bpo.config.training import DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import iterate_groups as iterate_groups
from bpo.job.durable import write_durably
from bpo.job.journal import to_line
from bpo.records import PreferenceGroup


def sample(groups: Iterable[PreferenceGroup], limit: int) -> Iterator[PreferenceGroup]:
    """Yields all groups (`limit` 0), or a random sample of `limit` groups in file order, with a fixed seed.

    Reservoir sampling (algorithm R): at most `limit` groups are in memory.
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
    for _, group in sorted(kept, key=lambda numbered: numbered[0]):
        yield group


def add_bad_record_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--on-bad` and `--max-bad-share`, with the defaults of `data.on_bad` and `data.max_bad_share`."""
    default, share = DataConfig.on_bad, DataConfig.max_bad_share
    parser.add_argument(
        "--on-bad",
        choices=["quarantine", "error"],
        default=default,
        help="skip and list bad records, or stop at the first one (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=share, help="largest share of bad records (default: %(default)s)"
    )


def bad_records_from(options: argparse.Namespace) -> BadRecords:
    """The bad-record policy set by the options of `add_bad_record_options`.

    Raises:
        ValueError: `--max-bad-share` is out of range.
    """
    if not 0 <= options.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share is {options.max_bad_share:g}; it must be between 0 and 1")
    return BadRecords(options.on_bad, options.max_bad_share)


def write_bad_records(path: Path, bad: BadRecords) -> None:
    """Lists bad records in the format of `bpo convert`; removes a stale list if there are none."""
    if not bad.problems:
        path.unlink(missing_ok=True)
        return
    write_durably(path, b"".join(to_line(problem.to_json()) for problem in bad.problems), sync=False)
