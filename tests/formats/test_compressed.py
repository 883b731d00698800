"""Compressed files: the same records as unpacked, up to the damage, and a stated amount of memory."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bpo.formats import compressed
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_annotations
from bpo.formats.importers.registry import open_source

RECORDS = [{"image": f"{n}.png", "caption": f"A bus {n}. {'é' * n}"} for n in range(300)]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def shard(num_records: int = len(RECORDS)) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for n, record in enumerate(RECORDS[:num_records]):
            for suffix, text in (("jpg", "x" * (512 * (n % 3) + n)), ("txt", record["caption"])):
                member = tarfile.TarInfo(f"{n:03}.{suffix}")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()


def contents(num_records: int = len(RECORDS)) -> dict[str, bytes]:
    """File name -> the first records in that form."""
    records = RECORDS[:num_records]
    rows = "".join(f'{r["image"]},"{r["caption"]}"\n' for r in records)
    return {
        "a.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode(),
        "a.json": json.dumps(records, ensure_ascii=False, indent=1).encode(),
        "a.csv": f"image,caption\n{rows}".encode(),
        "a.tar": shard(num_records),
    }


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("num_records", [1, 300])
def test_a_compressed_file_holds_the_same_records(tmp_path: Path, suffix: str, num_records: int) -> None:
    for name, content in contents(num_records).items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.{suffix}").write_bytes(PACKERS[suffix](content))
        plain, packed = (open_source(tmp_path / n) for n in (name, f"{name}.{suffix}"))
        assert plain.schema is packed.schema is not None and packed.schema.name == "table"
        records = [piece.source for piece in plain.container.pieces()]
        assert len(records) == num_records and [piece.source for piece in packed.container.pieces()] == records


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_records_before_the_damage_are_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpo.formats.jsonscan.CHUNK_BYTES", 1000)
    content = gzip.compress(contents()[name])
    (tmp_path / f"{name}.gz").write_bytes(content[: len(content) * 3 // 4])
    bad = BadRecords("quarantine")
    assert len(read_annotations(tmp_path / f"{name}.gz", bad).annotations) > 100
    (problem,) = bad.problems
    assert problem.code == "torn-record" and f"{name}.gz" in problem.detail and "cut off" in problem.detail


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    content = bytearray(PACKERS[suffix](contents()["a.jsonl"]))
    content[10:20] = b"0123456789"
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.{suffix}: .*damaged or cut off"):
        read_annotations(tmp_path / f"a.{suffix}")


def test_zstd_without_pyarrow_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(PACKERS["zst"](b"{}\n"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.jsonl.zst: zstd requires pyarrow; pip install 'bpo\[hub\]'"):
        read_annotations(tmp_path / "a.jsonl.zst")


# Files of some kB that expand to more than the machine has. Each is refused or read within the limit below.
MAX_MIB = 600
SCRIPT = """
import json, resource, sys
from pathlib import Path
from bpo.formats.check import check_data
from bpo.formats.importers.registry import open_source
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if path.suffix == ".jsonl":
            text = str(check_data(path, image_root=path.parent).examples)
        else:
            pieces = [piece.damage and piece.damage.message for piece in open_source(path).container.pieces()]
            text = f"{len(pieces)} records, {next(filter(None, pieces), None)}"
    except ValueError as error:
        text = str(error)
    peak_kib = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found[path.name] = [text, int(peak_kib.split()[1]) >> 10]
print(json.dumps(found))
"""


def test_a_bomb_in_any_container_takes_bounded_memory(tmp_path: Path) -> None:
    _write_tables(tmp_path)
    _write_streams(tmp_path)
    _write_pictures(tmp_path)
    assert all(path.stat().st_blocks * 512 < 2_000_000 for path in tmp_path.rglob("*") if path.is_file())
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    expected = {
        "cells.parquet": "64 records, None",  # read in parts
        "list.parquet": "row 0: the row takes 8000 MiB, more than 128",
        "page.parquet": "row group 0 takes 130 MiB, more than 20 times its",
        "nulls.parquet": "row group 0 takes 137 MiB",
        "saved": "record batches are compressed",
        "blank.jsonl.gz": "expand to more than 200 times as much",
        "line.jsonl.zst": "a line of more than 64 MiB",
        "list.json.zst": "unterminated record",
        "row.csv.zst": "it has more than 64 MiB",
        "header.tar.zst": "a header of 314572800 bytes",
        "sample.tar": "the sample has more than 256 MiB",
        "pictures.jsonl": "Decompressed data too large",
    }
    assert found.keys() - expected.keys() == {"deep.png", "text.png", "clear.png"}
    for name, message in expected.items():
        assert message in found[name][0], (name, found[name])
    assert max(peak for _, peak in found.values()) < MAX_MIB, {name: peak for name, (_, peak) in found.items()}


def _write_tables(root: Path) -> None:
    large = pyarrow.array(["x" * (8 << 20)])
    pair = {"prompt": ["What?"], "chosen": ["a"], "rejected": ["b"], "images": ["0.png"]}
    cells = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), large)
    many = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), large)
    nulls = pyarrow.nulls(9_000_000, pyarrow.string())
    for name, table, options in (
        ("cells", {**{key: value * 64 for key, value in pair.items()}, "images": [None] * 64, "chosen": cells}, {}),
        ("list", pair | {"images": pyarrow.ListArray.from_arrays([0, 1000], many)}, {}),
        ("page", pair | {"chosen": ["x" * (130 << 20)]}, {"use_dictionary": False}),
        ("nulls", pair | {"images": pyarrow.ListArray.from_arrays([0, len(nulls)], nulls)}, {}),
    ):
        pyarrow.parquet.write_table(
            pyarrow.table(table), compression="zstd", where=root / f"{name}.parquet", write_statistics=False, **options
        )
    (root / "saved").mkdir()
    (root / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    table = pyarrow.table(pair)
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(root / "saved" / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table)


def _write_streams(root: Path) -> None:
    def zst(name: str, content: bytes) -> None:
        (root / f"{name}.zst").write_bytes(PACKERS["zst"](content))

    (root / "blank.jsonl.gz").write_bytes(gzip.compress((b" " * 1023 + b"\n") * (140 << 10), 9))
    zst("line.jsonl", b'{"id": "' + b"x" * (70 << 20))
    zst("list.json", b'["' + b"x" * (70 << 20))
    zst("row.csv", b"image,caption\na,b\n" + (b'"' + b"x" * 1000 + b'\n",') * 70_000)
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, 300 << 20
    zst("header.tar", shard()[:1536] + header.tobuf() + bytes(1 << 20))
    with (root / "sample.tar").open("wb") as file:  # with holes
        for number in range(4):
            member = tarfile.TarInfo(f"a.{number}.txt")
            member.size = 90 << 20
            file.write(member.tobuf())
            file.seek(member.size, io.SEEK_CUR)
        file.write(bytes(1024))


def _write_pictures(root: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def png(name: str, side: int, colour: int, bits: int, bytes_per_pixel: int, extra: bytes = b"") -> None:
        packer = zlib.compressobj(1)
        pixels = b"".join(packer.compress(bytes(1 + side * bytes_per_pixel)) for _ in range(side)) + packer.flush()
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0))
        content = b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        (root / name).write_bytes(content)

    png("deep.png", 5000, 0, 16, 2)
    png("clear.png", 5000, 6, 8, 4)
    png("text.png", 4, 2, 8, 3, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(100 << 20))))
    rows = [{"image": f"{name}.png", "caption": "A bus."} for name in ("deep", "clear", "text")]
    (root / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_that_compresses_well_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    line = json.dumps({"image": "a.png", "caption": "A bus. " * 20}) + "\n"
    lines = "".join(line.replace("A bus", f"A bus {n * n}") for n in range(20_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9))
    assert len(lines) > 3 << 20 and len(read_annotations(tmp_path / "a.jsonl.gz").annotations) == 20_000
