"""Records of Arrow tables: parquet files, what `datasets` saved to disk, and rows that it streams from the hub.

Images are never decoded here: a cell of them is `{"bytes", "path"}`, as it stands in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bpo.formats.jsonfiles import Piece
from bpo.formats.messages import MESSAGE_FIELDS, turns_of_columns

ROWS = 64  # at a time: a row may hold images
HUB = "hub:"


def parquet_pieces(path: Path) -> Iterator[Piece]:
    """Raises: ValueError: pyarrow is missing, or the file is damaged."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install 'bpo[hub]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _pieces(file.iter_batches(batch_size=ROWS), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged parquet ({error}); fetch it again") from error


def saved_pieces(path: Path) -> Iterator[Piece]:
    """The rows of a folder that `Dataset.save_to_disk` wrote.

    Raises:
        ValueError: `datasets` is missing, or the folder is damaged.
    """
    datasets = _datasets(str(path))
    try:
        tables = datasets.load_from_disk(str(path)).with_format("arrow").iter(batch_size=ROWS)
        yield from _pieces(tables, str(path))
    except Exception as error:  # a damaged table raises anything: ArrowInvalid, KeyError, JSONDecodeError
        raise ValueError(f"{path} is a damaged dataset ({_first_line(error)}); save it again") from error


def hub_pieces(path: Path) -> Iterator[Piece]:
    """The rows of `hub:OWNER/NAME[:SPLIT]`, streamed; in place of a name on the hub a folder may stand.

    Raises:
        ValueError: `datasets` or the network is missing, or there is no such dataset or split.
    """
    name, _, split = str(path).removeprefix(HUB).partition(":")
    datasets = _datasets(str(path))
    try:
        loaded = datasets.load_dataset(name, split=split or None, streaming=True)
    except Exception as error:  # whatever the hub, the network and the builders raise
        raise ValueError(f"{path} cannot be loaded ({_first_line(error)}); check name, split and network") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}; name one: {HUB}{name}:{next(iter(loaded))}")
        (loaded,) = loaded.values()
    try:
        yield from _pieces(loaded.with_format("arrow").iter(batch_size=ROWS), str(path))
    except Exception as error:
        raise ValueError(f"{path} broke off ({_first_line(error)}); start again") from error


def _pieces(tables: Iterator[Any], source: str) -> Iterator[Piece]:
    index = 0
    for table in tables:
        for row in table.to_pylist():
            # A null cell of a table is a field that is not there.
            cells = {name: _plain(value) for name, value in row.items() if value is not None}
            for name in cells.keys() & MESSAGE_FIELDS:
                cells[name] = turns_of_columns(cells[name])
            yield Piece(f"{source}, row {index}", index, False, cells)
            index += 1


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: this needs the package datasets; pip install 'bpo[hub]'") from error
    return datasets


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it; the bytes of images stay bytes."""
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
