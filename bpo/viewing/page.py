"""Writes the page: an index of all records, chunks that the browser loads as they are looked at, and statistics.

Everything lies in one folder and works from a file: data are scripts that call one function with JSON. The policy of
the page lets no other script run, and its own script puts text into the page as text.
"""

from __future__ import annotations

import html
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from bpo.charts import histogram, share_bars

CHUNK_RECORDS = 50
ASSETS = ("view.css", "view.js")
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file:; base-uri 'none'; "
    "form-action 'none'"
)


class PageWriter:
    """Takes entries in order and writes chunks as they fill; `finish` writes index and page.

    Args:
        folder: Where the page goes; a page that lies there is replaced, anything else refused.
        title: For people, such as the file's name.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        prepare_folder(folder)
        self._chunk: list[Mapping[str, Any]] = []
        self._index: list[list[Any]] = []
        self._num_chunks = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        self._index.append(index_row(entry))
        self._chunk.append(entry)
        if len(self._chunk) == CHUNK_RECORDS:
            self._write_chunk()

    def finish(self, statistics: Mapping[str, Any]) -> Path:
        if self._chunk:
            self._write_chunk()
        index = {"title": self.title, "chunk": CHUNK_RECORDS, "columns": INDEX_COLUMNS, "rows": self._index}
        self._write_script("data/index.js", "bpoIndex", index)
        for name in ASSETS:
            shutil.copyfile(str(_asset(name)), self.folder / name)
        path = self.folder / "index.html"
        path.write_text(render(self.title, self._index, statistics), encoding="utf-8")
        return path

    def _write_chunk(self) -> None:
        self._write_script(f"data/{self._num_chunks:05}.js", "bpoChunk", [self._num_chunks, self._chunk])
        self._num_chunks += 1
        self._chunk = []

    def _write_script(self, name: str, function: str, value: Any) -> None:
        # ASCII JSON is a script whatever it says, and no byte of it ends one.
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        (self.folder / name).write_text(f"{function}({text});\n", encoding="ascii")


INDEX_COLUMNS = ("id", "types", "reasons", "words", "margin")


def index_row(entry: Mapping[str, Any]) -> list[Any]:
    """What filters need of a record before its chunk is loaded: `INDEX_COLUMNS`."""
    types = [c["type"] for c in entry["completions"]]
    reasons = sorted({f"{r['source']}: {r['reason']}" for r in entry["refused"]})
    words = max((c["words"] for c in entry["completions"]), default=0)
    return [entry["id"], types, reasons, words, entry["margin"]]


def prepare_folder(folder: Path) -> None:
    """Empties a page's folder.

    Raises:
        ValueError: it holds something that is no page.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "view.js").exists():
            raise ValueError(f"{folder} holds something that is no page; give another folder with --out")
        for name in ("data", "images"):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "data").mkdir(parents=True, exist_ok=True)


def render(title: str, rows: Sequence[Sequence[Any]], statistics: Mapping[str, Any]) -> str:
    """The HTML: head with its policy, statistics, and the empty places that the script fills."""
    template = _asset("view.html").read_text(encoding="utf-8")
    words = Counter(row[3] for row in rows)
    types = Counter(kind for row in rows for kind in row[1])
    reasons = Counter(reason for row in rows for reason in row[2])
    margins = [row[4] for row in rows if row[4] is not None]
    charts = [
        _figure("Completions by type", share_bars("completions by type", types.most_common())),
        _figure("Longest completion, words", histogram("words of the longest completion", words)),
    ]
    if reasons:
        charts.append(_figure("Refused, by source and reason", share_bars("refusals", reasons.most_common(12))))
    if margins:
        rounded = Counter(round(value) for value in margins)
        charts.append(_figure("Smallest margin of a pair, nats", histogram("margin", rounded)))
    objects = [figure for source, one in statistics.items() for figure in _source_figures(source, one)]
    fill = {
        "policy": POLICY,
        "title": html.escape(title),
        "count": f"{len(rows):,}",
        "charts": "".join(charts),
        "more": _folded("Objects", "".join(objects)) if objects else "",
    }
    for name, value in fill.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def _source_figures(source: str, statistics: Mapping[str, Any]) -> Iterable[str]:
    for name, title in (("objects_added", "objects added"), ("objects_dropped", "objects dropped")):
        if statistics.get(name):
            rows = list(statistics[name].items())[:10]
            yield _figure(f"{source}: {title}", share_bars(f"{source}, {title}", rows))


def _folded(title: str, charts: str) -> str:
    return f'<details><summary>{html.escape(title)}</summary><div class="charts">{charts}</div></details>'


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _asset(name: str) -> Any:
    return files("bpo.viewing").joinpath("assets").joinpath(name)
