"""Maintenance of a reference store: `bpo refs inspect | verify | compact DIR`. Only `follow` needs torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bpo.job.durable import sync_directory
from bpo.job.terminal import printable
from bpo.model.reference.format import (
    ReferenceStoreError,
    Shard,
    ShardWriter,
    damaged_rows,
    index_files,
    is_free,
    read_fingerprint,
    read_shard,
    settled,
    write_index,
)
from bpo.model.reference.index import EntryIndex

_OLDER = "skip shards modified in the last N minutes, which a job may still be writing (default: %(default)s)"
_OLDER_WITHOUT_LOCKS = "on a file system without file locks: " + _OLDER


@dataclass(frozen=True)
class StoreSummary:
    """Contents of a store. `num_tokens` and `num_entries` count each key once; `num_duplicates` counts repetitions."""

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
    """The fingerprint and all shards of a store, including shards with another fingerprint."""
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
    """Damage of one shard: the header, index records, or entries (`rows`) whose values fail their checksum."""

    shard: Shard
    rows: np.ndarray

    def lines(self) -> Iterable[str]:
        if not self.shard.fits:
            yield f"{self.shard.index}: not part of this store: damaged header or another fingerprint"
        if self.shard.num_damaged:
            yield f"{self.shard.index}: {self.shard.num_damaged} damaged index records"
        for row in self.rows:
            record = self.shard.records_E[row]
            where = f"{record['count']} values at offset {record['offset']}"
            yield f"{self.shard.values}: entry {record['key'].tobytes().hex()}: {where} fail their checksum"


def find_damage(directory: Path) -> list[Damage]:
    """Reads the whole store and verifies every checksum."""
    _, shards = read_store(directory)
    found = [Damage(shard, damaged_rows(shard)) for shard in shards]
    return [damage for damage in found if len(damage.rows) or damage.shard.num_damaged or not damage.shard.fits]


def remove_damaged(directory: Path, damage: list[Damage], older_than_minutes: float) -> int:
    """Removes damaged entries from the index, so that the next run recomputes them; returns how many shards changed.

    Skips shards to which a process still writes. A run that died writes no more: there is nothing to wait for.
    The index of a shard that is not part of the store is renamed to NAME.index.rejected. Values remain until `compact`.
    """
    fingerprint = read_fingerprint(directory)
    removable = [damaged for damaged in damage if is_free(damaged.shard, older_than_minutes)]
    for damaged in removable:
        shard = damaged.shard
        if shard.fits:
            write_index(shard.index, fingerprint, np.delete(shard.records_E, damaged.rows))
        else:
            shard.index.rename(shard.index.with_suffix(".index.rejected"))
    sync_directory(directory)
    return len(removable)


def compact_store(directory: Path, older_than_minutes: float) -> tuple[int, int, int]:
    """Merges settled shards into one and drops duplicates; returns the numbers of shards merged, entries kept, dropped.

    The merged shard is complete and durable before an old shard is deleted, so an interrupted compaction leaves at most
    duplicates. Running jobs that have read the index keep the old files mapped.

    Raises:
        ReferenceStoreError: The store is damaged, or the disk is full.
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
    # In the order of the old files, so that each is read sequentially.
    for row in np.lexsort((index.offset_E, index.shard_E)):
        start, count = int(index.offset_E[row]), int(index.count_E[row])
        writer.add(index.key(int(row)), values[int(index.shard_E[row])][start : start + count])
    writer.close()
    for shard in old:
        shard.index.unlink()  # before its values: an index without values counts as torn
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
        stray = "" if shard["belongs"] else ", NOT PART OF THIS STORE"
        print(
            f"  {shard['name']}: {shard['num_entries']:,} entries, {shard['num_bytes']:,} bytes{torn}{damaged}{stray}"
        )
    print("fingerprint:")
    for field, value in sorted(summary.fingerprint.items()):
        print(printable(f"  {field}: {value}"))


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
        print(f"{arguments.dir}: all checksums match")
        return 0
    for damaged in damage:
        print(printable("\n".join(damaged.lines())))
    if not arguments.remove_damaged:
        print(f"remove them with `bpo refs verify {arguments.dir} --remove-damaged`; the next run recomputes them")
        return 1
    changed = remove_damaged(arguments.dir, damage, arguments.older_than_minutes)
    print(f"{changed} of {len(damage)} damaged shards repaired; the next run recomputes the removed entries")
    if changed < len(damage):
        print("a running job may still be writing to the others; try again when it has ended")
    return 0 if changed == len(damage) else 1


def _compact(arguments: argparse.Namespace) -> int:
    merged, kept, dropped = compact_store(arguments.dir, arguments.older_than_minutes)
    print(f"{arguments.dir}: {merged} shards merged, {kept:,} entries kept, {dropped:,} duplicates dropped")
    return 0


def _follow(arguments: argparse.Namespace) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:  # before the imports, which take seconds
        import torch

        from bpo.job.launch import Ranks, pick_device, setup_logging
        from bpo.tools.refs_follow import follow

        setup_logging(Ranks())
        device = torch.device(arguments.device) if arguments.device else pick_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        follow(arguments.run_dir, device, stop)
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bpo refs", description="Maintain a store of reference log-probs.")
    commands = parser.add_subparsers(required=True, metavar="{inspect,verify,compact,follow}")
    inspect = commands.add_parser("inspect", help="show the fingerprint and contents of the store")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="verify all checksums; exit status 1 if anything is damaged")
    verify.add_argument("--remove-damaged", action="store_true", help="remove damaged entries from the index")
    verify.set_defaults(run=_verify)
    compact = commands.add_parser("compact", help="merge the shards into one and drop duplicates")
    compact.set_defaults(run=_compact)
    for command in (inspect, verify, compact):
        command.add_argument("dir", type=Path, help="store: train.reference_dir, or OUTPUT_DIR/reference")
    for command, older in ((verify, _OLDER_WITHOUT_LOCKS), (compact, _OLDER)):
        command.add_argument("--older-than-minutes", type=float, default=60.0, metavar="N", help=older)
    follow = commands.add_parser("follow", help="fill the store of an online run's current reference while it trains")
    follow.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="train.output_dir of the run")
    follow.add_argument("--device", default="", help="such as cuda:1, free of the run (default: the first)")
    follow.set_defaults(run=_follow)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
