"""Records from Arrow tables: parquet files, datasets saved with `datasets`, and rows streamed from the Hub.

Images are not decoded here: an image cell remains `{"bytes", "path"}`, as in the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bpo.formats.foreign import foreign_kind
from bpo.formats.importers.expansion import check_row_groups, check_uncompressed, split_rows
from bpo.formats.jsonfiles import Piece, open_file
from bpo.formats.messages import MESSAGE_FIELDS, turns_of_columns

ROWS = 64  # per batch; a row may contain images
HUB = "hub:"


def parquet_pieces(path: Path) -> Iterator[Piece]:
    """Yields the rows of a parquet file.

    Memory is bounded by the limits of `bpo.formats.importers.expansion`.

    Raises:
        ValueError: pyarrow is missing, the file is damaged, or a row group expands too far.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet requires pyarrow; pip install 'bpo[hub]'") from error
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        check_row_groups(path, metadata)
        # Whether an entry of a dictionary fills one cell or thousands is only known while it is a dictionary.
        columns = metadata.schema
        texts = [columns.column(n).path for n in range(len(columns)) if columns.column(n).physical_type == "BYTE_ARRAY"]
        reading = {"read_dictionary": texts, "buffer_size": 1 << 20, "pre_buffer": False}
        with pyarrow.parquet.ParquetFile(path, **reading) as file:
            yield from _pieces(file.iter_batches(batch_size=ROWS), str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        with open_file(path) as raw:
            kind = foreign_kind(raw.read(512), path.name)
        if kind is not None:
            raise ValueError(f"{path} is {kind}") from error
        raise ValueError(f"{path} is a damaged parquet file ({error}); download it again") from error


def saved_pieces(path: Path) -> Iterator[Piece]:
    """Yields the rows of a folder written by `Dataset.save_to_disk`.

    Raises:
        ValueError: `datasets` is not installed, or the folder is damaged.
    """
    datasets = _datasets(str(path))
    try:
        for entry in json.loads((path / "state.json").read_bytes())["_data_files"]:
            check_uncompressed(path / entry["filename"])
        tables = datasets.load_from_disk(str(path)).with_format("arrow").iter(batch_size=ROWS)
        yield from _pieces(tables, str(path))
    except Exception as error:  # a damaged table may raise ArrowInvalid, KeyError, JSONDecodeError, ...
        raise ValueError(f"{path} is a damaged dataset ({_first_line(error)}); save it again") from error


def hub_pieces(path: Path) -> Iterator[Piece]:
    """Streams the rows of `hub:OWNER/NAME[:SPLIT]`; a local folder may replace the Hub name.

    Raises:
        ValueError: `datasets` is not installed, the network is down, or the dataset or split does not exist.
    """
    name, _, split = str(path).removeprefix(HUB).partition(":")
    datasets = _datasets(str(path))
    try:
        loaded = datasets.load_dataset(name, split=split or None, streaming=True)
    except Exception as error:  # any error of the Hub, the network or a dataset builder
        raise ValueError(f"{path} cannot be loaded ({_first_line(error)}); check name, split and network") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}; choose one: {HUB}{name}:{next(iter(loaded))}")
        (loaded,) = loaded.values()
    try:
        yield from _pieces(loaded.with_format("arrow").iter(batch_size=ROWS), str(path))
    except Exception as error:
        raise ValueError(f"streaming {path} failed ({_first_line(error)}); try again") from error


def _pieces(tables: Iterator[Any], source: str) -> Iterator[Piece]:
    index = 0
    for rows, damage in (split for table in tables for split in split_rows(table)):
        for row in rows:
            # A null cell means an absent field.
            cells = {name: _plain(value) for name, value in row.items() if value is not None}
            for name in cells.keys() & MESSAGE_FIELDS:
                cells[name] = turns_of_columns(cells[name])
            yield Piece(f"{source}, row {index}", index, False, cells, damage)
            index += 1


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: requires the package datasets; pip install 'bpo[hub]'") from error
    return datasets


def _plain(value: Any) -> Any:
    """Converts a cell to JSON types; image bytes are kept."""
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
