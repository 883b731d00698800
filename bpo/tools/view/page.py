"""Writes the page: an index of all records, chunks that the browser loads as they are looked at, texts to search.

Everything lies in one folder and works from a file: data are scripts that call one function with JSON. The policy of
the page lets no other script run, and its own script puts text into the page as text.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from bpo.tools.view import plots
from bpo.tools.view.plots import Statistics

# A chunk is a page of records in the file's order; texts are found in larger files, for a search reads them all.
CHUNK_RECORDS = 20
TEXT_RECORDS = 1000
ASSETS = ("view.css", "view.svg", "records.js", "view.js")
# `file:` beside 'self': the origin of a page opened from a file is opaque, and nothing is 'self' to it.
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
        self.statistics = Statistics()
        self._names = {"types": _Names(), "sources": _Names(), "reasons": _Names()}
        self._rows: list[list[Any]] = []
        self._chunk: list[Mapping[str, Any]] = []
        self._texts: list[str] = []

    def add(self, entry: Mapping[str, Any]) -> None:
        """Takes an entry of `entry_of` or `refused_only`."""
        self._rows.append(self._row(entry))
        self._count(entry)
        self._chunk.append(entry)
        self._texts.append(searched_text(entry))
        if len(self._chunk) == CHUNK_RECORDS:
            self._write_chunk()
        if len(self._texts) == TEXT_RECORDS:
            self._write_texts()

    def finish(self) -> Path:
        """Writes what is left, the index and index.html, whose path it returns; `statistics` may be filled before."""
        if self._chunk:
            self._write_chunk()
        if self._texts:
            self._write_texts()
        sizes = {"chunk": CHUNK_RECORDS, "textChunk": TEXT_RECORDS}
        names = {kind: list(one.numbers) for kind, one in self._names.items()}
        self._write_script("data/index.js", "bpoIndex", {**sizes, **names, "rows": self._rows})
        figures = json.dumps(plots.to_json(self.statistics), indent=1)
        (self.folder / "statistics.json").write_text(figures + "\n", encoding="ascii")
        path = self.folder / "index.html"
        path.write_text(render(self.title, self.statistics), encoding="utf-8")
        return path

    def _row(self, entry: Mapping[str, Any]) -> list[Any]:
        """What filters need of a record: id, [type, source, words, best, margin] of each completion, reasons."""
        types, sources, reasons = self._names.values()
        completions = [
            [types.number(c["type"]), sources.number(c["source"]), c["words"], int(c["best"]), c["margin"]]
            for c in entry["completions"]
        ]
        refused = sorted({reasons.number(f"{r['source']}: {r['reason']}") for r in entry["refused"]})
        return [entry["id"], completions, refused]

    def _count(self, entry: Mapping[str, Any]) -> None:
        statistics = self.statistics
        statistics.num_records += 1
        statistics.completions.update(c["type"] for c in entry["completions"])
        statistics.refused.update((r["source"], r["reason"]) for r in entry["refused"])
        margins = [c["margin"] for c in entry["completions"] if c["margin"] is not None]
        if margins:
            statistics.margins[round(min(margins))] += 1

    def _write_chunk(self) -> None:
        number = (len(self._rows) - 1) // CHUNK_RECORDS
        self._write_script(f"data/{number:05}.js", "bpoChunk", [number, self._chunk])
        self._chunk = []

    def _write_texts(self) -> None:
        number = (len(self._rows) - 1) // TEXT_RECORDS
        self._write_script(f"data/text-{number:05}.js", "bpoTexts", [number, self._texts])
        self._texts = []

    def _write_script(self, name: str, function: str, value: Any) -> None:
        # ASCII JSON is a script whatever it says, and no byte of it ends one.
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        (self.folder / name).write_text(f"{function}({text});\n", encoding="ascii")


class _Names:
    """Names by number: an index of many records says each name once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


def searched_text(entry: Mapping[str, Any]) -> str:
    """Id, file names, prompt, completions and refused texts, as the page's search compares them."""

    def said(one: Mapping[str, Any]) -> str:
        return "".join(segment[1] for segment in one["segments"] if segment[0] in "=+~")

    names: Iterable[str] = (entry["id"], *(image["name"] for image in entry["images"]))
    texts = (
        *(turn["text"] for turn in entry["prompt"]),
        *map(said, entry["completions"]),
        *map(said, entry["refused"]),
    )
    return unicodedata.normalize("NFC", "\n".join((*names, *texts)).lower())


def prepare_folder(folder: Path) -> None:
    """Makes a folder ready for a page, and empties it of an older one.

    Raises:
        ValueError: it holds something that is no page.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "view.js").exists():
            raise ValueError(f"{folder} holds something that is no page; give another folder with --out")
        (folder / "index.html").unlink(missing_ok=True)  # until the new one is whole
        for name in ("data", "images"):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("data", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        shutil.copyfile(str(_asset(name)), folder / name)


def render(title: str, statistics: Statistics) -> str:
    """The HTML: head with its policy, statistics, and the empty places that the script fills."""
    fill = {
        "policy": POLICY,
        "title": html.escape(title),
        "lead": plots.lead(statistics),
        "charts": plots.overview(statistics),
        "sources": plots.by_source(statistics),
        "left_out": plots.left_out(statistics.problems),
    }
    template = _asset("view.html").read_text(encoding="utf-8")
    # In one pass: a title may spell a place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: str(fill[place.group(1)]), template)


def _asset(name: str) -> Any:
    return files("bpo.tools.view").joinpath("assets").joinpath(name)
