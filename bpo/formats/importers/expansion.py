"""How much memory a parquet or Arrow file needs, found from its page headers before anything is decompressed.

A parquet file of a few kB can hold pages of gigabytes, and one dictionary entry of megabytes can fill any number of
cells.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bpo.formats.jsonscan import Damage

# A row group may expand to the larger of the two.
FREE_BYTES = 128 << 20
MAX_RATIO = 20
MAX_ROW_BYTES = 128 << 20
_BATCH_BYTES = 64 << 20
_HEADER_BYTES = (4 << 10, 1 << 20)  # with statistics, a header may be long
_BYTES_PER_NESTED_VALUE = 16  # levels, validity and offsets
_BYTES_PER_CELL = 16


def check_row_groups(path: Path, metadata: Any) -> None:
    """Checks the expansion of each row group.

    Args:
        metadata: `pyarrow.parquet.ParquetFile.metadata`; its sizes are not trusted.

    Raises:
        ValueError: A row group expands too far, or a page header is damaged.
    """
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            expanded = compressed = 0
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                is_nested = metadata.schema.column(column).max_repetition_level > 0
                for page_bytes, stored_bytes, num_values in _pages(path, file, chunk):
                    expanded += page_bytes + _BYTES_PER_NESTED_VALUE * num_values * is_nested
                    compressed += stored_bytes
            if expanded > max(FREE_BYTES, MAX_RATIO * compressed):
                raise ValueError(
                    f"{path}: row group {group} takes {expanded >> 20} MiB, more than {MAX_RATIO} times its "
                    f"{compressed} bytes; write it with smaller row groups, or check where it comes from"
                )


def _pages(path: Path, file: BinaryIO, chunk: Any) -> Iterator[tuple[int, int, int]]:
    """Yields (uncompressed bytes, stored bytes, values) of each page, until the values of the chunk are complete."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    end, num_values = at + chunk.total_compressed_size, 0
    while at < end and num_values < chunk.num_values:
        page_bytes, stored_bytes, values, num_bytes = _page_header(path, file, at)
        yield page_bytes, stored_bytes, values
        num_values += values
        at += num_bytes + stored_bytes


def _page_header(path: Path, file: BinaryIO, at: int) -> tuple[int, int, int, int]:
    """Returns (uncompressed bytes, stored bytes, values, bytes of the header) of the page at a position."""
    for size in _HEADER_BYTES:
        file.seek(at)
        try:
            header, num_bytes = _struct(file.read(size), 0)
            values = next((header[kind].get(1, 0) for kind in (5, 8) if kind in header), 0)
            if min(header[2], header[3], values) >= 0:
                return header[2], header[3], values, num_bytes
        except (IndexError, KeyError, RecursionError, AttributeError, TypeError):  # cut off, or not a header
            continue
    raise ValueError(f"{path} is a damaged parquet file (page header at byte {at}); download it again")


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Parses a struct of Thrift's compact protocol (parquet-format, PageHeader); returns its fields and its end."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, kind & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _varint(data, at)
        return None, at + size
    if kind == 12:
        return _struct(data, at)
    raise KeyError(kind)  # page headers contain no lists or maps


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at
        if shift > 63:
            raise IndexError("an integer of more than 64 bits")


def split_rows(batch: Any) -> Iterator[tuple[list[dict[str, Any]], Damage | None]]:
    """Yields the rows of a record batch or table as Python objects, as many at a time as memory allows.

    A row of more than `MAX_ROW_BYTES`, or with a text that is not UTF-8, is yielded alone, empty, with a `Damage`.
    """
    size = sum(_size_of(column) for column in batch.columns)
    damage: Damage | None = None
    if size > (_BATCH_BYTES if batch.num_rows > 1 else MAX_ROW_BYTES):
        damage = Damage("too-large", f"the row takes {size >> 20} MiB, more than {MAX_ROW_BYTES >> 20}; split it")
    else:
        try:
            yield _plain_rows(batch), None
        except UnicodeDecodeError:
            damage = Damage("invalid-utf8", "a text is not UTF-8; write the file again")
    if damage is not None and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from split_rows(batch.slice(0, half))
        yield from split_rows(batch.slice(half))
    elif damage is not None:
        yield [{}], damage


def _size_of(column: Any) -> int:
    """Returns about the bytes that the values of an array take as Python objects."""
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(column, pyarrow.ChunkedArray):
        return sum(map(_size_of, column.chunks))
    kind, size = column.type, _BYTES_PER_CELL * len(column)
    if isinstance(column, pyarrow.ExtensionArray):
        return _size_of(column.storage)
    if pyarrow.types.is_dictionary(kind):
        if not len(column):
            return 0
        longest = _longest(column.dictionary)
        if size + longest * len(column) <= MAX_ROW_BYTES or not _has_length(column.dictionary.type):
            return size + longest * len(column)
        lengths = compute.binary_length(column.dictionary)
        return size + (compute.sum(lengths.take(column.indices)).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return size + sum(_size_of(child) for child in column.flatten())
    if pyarrow.types.is_nested(kind):  # a list or a map
        return size + _size_of(column.flatten())
    if _has_length(kind):
        return size + (compute.sum(compute.binary_length(column)).as_py() or 0)
    return size + column.nbytes


def _has_length(kind: Any) -> bool:
    import pyarrow.types as types

    return any(
        is_kind(kind) for is_kind in (types.is_binary, types.is_string, types.is_large_binary, types.is_large_string)
    )


def _longest(values: Any) -> int:
    import pyarrow.compute as compute

    if not _has_length(values.type):
        return values.nbytes
    return compute.max(compute.binary_length(values)).as_py() or 0


def _plain_rows(batch: Any) -> list[dict[str, Any]]:
    """Converts rows; columns read as dictionaries are cast first, because converting their cells one by one is slow."""
    import pyarrow

    columns = [
        column.cast(_plain(column.type)) if _plain(column.type) != column.type else column for column in batch.columns
    ]
    return pyarrow.Table.from_arrays(columns, names=batch.schema.names).to_pylist()


def _plain(kind: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return kind.value_type
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    if pyarrow.types.is_map(kind):
        return pyarrow.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def check_uncompressed(path: Path) -> None:
    """Checks that the record batches of an Arrow stream are stored uncompressed, as `datasets` saves them.

    Raises:
        ValueError: A batch is compressed; `datasets` would decompress the whole file at once.
    """
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
                raise ValueError(f"{path}: its record batches are compressed; save it with `Dataset.save_to_disk`")


def _is_compressed(message: bytes) -> bool:
    """Reads `RecordBatch.compression` of a flatbuffer (Arrow's format/Message.fbs)."""
    table = _table_field(message, struct.unpack_from("<I", message)[0], 2)
    batch = table + struct.unpack_from("<I", message, table)[0] if table else 0
    return bool(batch and _table_field(message, batch, 3))


def _table_field(message: bytes, table: int, number: int) -> int:
    """Returns the position of a field of a flatbuffer table, or 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", message, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", message, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0
