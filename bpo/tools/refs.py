"""Looks after a reference store: `bpo refs inspect | verify | compact DIR`. Needs numpy, not torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bpo.job.durable import sync_directory
from bpo.model.reference.format import (
    ReferenceStoreError,
    Shard,
    ShardWriter,
    damaged_rows,
    index_files,
    read_fingerprint,
    read_shard,
    settled,
    write_index,
)
from bpo.model.reference.index import EntryIndex

_OLDER = "leave shards alone that were written to within so many minutes: a job may not have finished them"


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds. `num_tokens` and `num_entries` count each key once, `num_duplicates` what is left."""

    directory: str
    fingerprint: dict[str, str]
    num_entries: int
    num_tokens: int
    num_duplicates: int
    num_bytes: int
    torn_bytes: int
    num_damaged_records: int
    shards: list[dict[str, object]]


def read_store(directory: Path) -> tuple[dict[str, str], list[Shard]]:
    """The fingerprint and every shard of a store, those that do not belong to it included."""
    fingerprint = read_fingerprint(directory)
    return fingerprint, [read_shard(path, fingerprint) for path in index_files(directory)]


def inspect_store(directory: Path) -> StoreSummary:
    fingerprint, shards = read_store(directory)
    index = EntryIndex(shards)
    described: list[dict[str, object]] = [
        {
            "name": shard.index.stem,
            "num_entries": len(shard.records_E),
            "num_bytes": sum(f.stat().st_size for f in (shard.index, shard.values) if f.exists()),
            "torn_bytes": shard.torn_bytes,
            "num_damaged_records": shard.num_damaged,
            "belongs": shard.fits,
        }
        for shard in shards
    ]
    return StoreSummary(
        directory=str(directory),
        fingerprint=fingerprint,
        num_entries=len(index),
        num_tokens=int(index.count_E.sum(dtype=np.int64)),
        num_duplicates=index.num_duplicates,
        num_bytes=sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        torn_bytes=sum(shard.torn_bytes for shard in shards),
        num_damaged_records=sum(shard.num_damaged for shard in shards),
        shards=described,
    )


@dataclass(frozen=True)
class Damage:
    """What is wrong with one shard: the whole of it, damaged records, or entries whose values fail their checksum."""

    shard: Shard
    rows: np.ndarray

    def lines(self) -> Iterable[str]:
        if not self.shard.fits:
            yield f"{self.shard.index}: not of this store: its header is damaged or names another fingerprint"
        if self.shard.num_damaged:
            yield f"{self.shard.index}: {self.shard.num_damaged} damaged index records"
        for row in self.rows:
            record = self.shard.records_E[row]
            where = f"{record['count']} values from {record['offset']}"
            yield f"{self.shard.values}: entry {record['key'].tobytes().hex()}: {where} differ from their checksum"


def find_damage(directory: Path) -> list[Damage]:
    """Reads every value of the store once and compares every checksum."""
    _, shards = read_store(directory)
    found = [Damage(shard, damaged_rows(shard)) for shard in shards]
    return [one for one in found if len(one.rows) or one.shard.num_damaged or not one.shard.fits]


def remove_damaged(directory: Path, damage: list[Damage], older_than_minutes: float) -> int:
    """Takes damaged entries out of the index, so that the next run computes them anew; returns how many shards changed.

    A shard that does not belong to the store is renamed to NAME.index.rejected. Values stay where they are until
    `compact`.
    """
    fingerprint = read_fingerprint(directory)
    settled_ones = [one for one in damage if settled(one.shard, older_than_minutes)]
    for one in settled_ones:
        if one.shard.fits:
            write_index(one.shard.index, fingerprint, np.delete(one.shard.records_E, one.rows))
        else:
            one.shard.index.rename(one.shard.index.with_suffix(".index.rejected"))
    sync_directory(directory)
    return len(settled_ones)


def compact_store(directory: Path, older_than_minutes: float) -> tuple[int, int, int]:
    """Merges settled shards into one and drops what stands there twice; returns shards merged, entries kept, dropped.

    The merged shard is complete and durable before an old one goes, so a compaction that is killed leaves duplicates at
    worst. Training that has read the store's index keeps its maps of the old files.

    Raises:
        ReferenceStoreError: something is damaged, which merging would hide; or the disk is full.
    """
    if damage := find_damage(directory):
        raise ReferenceStoreError(
            f"{directory}: {len(damage)} damaged shards; run `bpo refs verify {directory} --remove-damaged` first"
        )
    fingerprint, shards = read_store(directory)
    old = [shard for shard in shards if settled(shard, older_than_minutes)]
    index = EntryIndex(old)
    if len(old) < 2 and not index.num_duplicates and not any(shard.torn_bytes for shard in old):
        return 0, len(index), 0
    writer = ShardWriter(directory, fingerprint, "compact")
    values = [shard.map_values() for shard in old]
    # In the order of the old files: each is read from its beginning to its end.
    for row in np.lexsort((index.offset_E, index.shard_E)):
        start, count = int(index.offset_E[row]), int(index.count_E[row])
        writer.add(index.key(int(row)), values[int(index.shard_E[row])][start : start + count])
    writer.close()
    for shard in old:
        shard.index.unlink()  # before its values: an index without values would look torn
        shard.values.unlink(missing_ok=True)
    sync_directory(directory)
    return len(old), len(index), index.num_duplicates


def _print_summary(summary: StoreSummary) -> None:
    print(f"{summary.directory}: {summary.num_entries:,} entries, {summary.num_tokens:,} tokens")
    print(
        f"{summary.num_bytes:,} bytes in {len(summary.shards)} shards, {summary.num_duplicates:,} duplicates, ", end=""
    )
    print(f"{summary.torn_bytes:,} torn bytes, {summary.num_damaged_records:,} damaged records")
    for shard in summary.shards:
        torn = f", {shard['torn_bytes']} torn bytes" if shard["torn_bytes"] else ""
        damaged = f", {shard['num_damaged_records']} damaged records" if shard["num_damaged_records"] else ""
        stray = "" if shard["belongs"] else ", NOT OF THIS STORE"
        print(
            f"  {shard['name']}: {shard['num_entries']:,} entries, {shard['num_bytes']:,} bytes{torn}{damaged}{stray}"
        )
    print("made for:")
    for field, value in sorted(summary.fingerprint.items()):
        print(f"  {field}: {value}")


def _inspect(arguments: argparse.Namespace) -> int:
    summary = inspect_store(arguments.dir)
    if arguments.json:
        print(json.dumps(asdict(summary), indent=1))
    else:
        _print_summary(summary)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    damage = find_damage(arguments.dir)
    if not damage:
        print(f"{arguments.dir}: every checksum is right")
        return 0
    for one in damage:
        print("\n".join(one.lines()))
    if not arguments.remove_damaged:
        print(f"`bpo refs verify {arguments.dir} --remove-damaged` takes them out; the next run computes them anew")
        return 1
    changed = remove_damaged(arguments.dir, damage, arguments.older_than_minutes)
    print(f"{changed} of {len(damage)} damaged shards repaired; the next run computes anew what was taken out")
    if changed < len(damage):
        print(f"the others were written to within {arguments.older_than_minutes:g} minutes; try again later")
    return 0 if changed == len(damage) else 1


def _compact(arguments: argparse.Namespace) -> int:
    merged, kept, dropped = compact_store(arguments.dir, arguments.older_than_minutes)
    print(f"{arguments.dir}: {merged} shards merged, {kept:,} entries kept, {dropped:,} duplicates dropped")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bpo refs", description="Look after a store of reference log-probs.")
    commands = parser.add_subparsers(required=True, metavar="{inspect,verify,compact}")
    inspect = commands.add_parser("inspect", help="what the store was made for and what it holds")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="compare every checksum; exit status 1 if something is damaged")
    verify.add_argument("--remove-damaged", action="store_true", help="take damaged entries out of the index")
    verify.set_defaults(run=_verify)
    compact = commands.add_parser("compact", help="merge the shards into one, without duplicates")
    compact.set_defaults(run=_compact)
    for command in (inspect, verify, compact):
        command.add_argument("dir", type=Path, help="the store: train.reference_dir, or OUTPUT_DIR/reference")
    for command in (verify, compact):
        command.add_argument("--older-than-minutes", type=float, default=60.0, metavar="N", help=_OLDER)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
