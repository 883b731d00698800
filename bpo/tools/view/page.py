"""Writes the page: an index of all records, chunks that the browser loads on demand, texts for the search.

The page is one folder and works from file://: data files are scripts that call one function with JSON. The content
security policy blocks all other scripts, and the page's own script inserts text only as text nodes.
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

# A chunk is one page of records in file order; search texts are in larger files, because a search reads all of them.
CHUNK_RECORDS = 20
TEXT_RECORDS = 1000
ASSETS = ("view.css", "view.svg", "records.js", "view.js")
# `file:` in addition to 'self': a page opened from a file has an opaque origin, which 'self' does not match.
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file:; base-uri 'none'; "
    "form-action 'none'"
)


class PageWriter:
    """Takes entries in order and writes each chunk when it is full; `finish` writes index and page.

    Args:
        folder: Output folder; an existing page is replaced.
        title: Title of the page, such as the file name.

    Raises:
        ValueError: The folder contains other files.
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
        """Adds an entry made by `entry_of` or `refused_only`."""
        self._rows.append(self._row(entry))
        self._count(entry)
        self._chunk.append(entry)
        self._texts.append(searched_text(entry))
        if len(self._chunk) == CHUNK_RECORDS:
            self._write_chunk()
        if len(self._texts) == TEXT_RECORDS:
            self._write_texts()

    def finish(self) -> Path:
        """Writes the remaining chunks, the index and index.html, and returns its path. Fill in `statistics` before."""
        if self._chunk:
            self._write_chunk()
        if self._texts:
            self._write_texts()
        sizes = {"chunk": CHUNK_RECORDS, "textChunk": TEXT_RECORDS}
        names = {kind: list(of_kind.numbers) for kind, of_kind in self._names.items()}
        self._write_script("data/index.js", "bpoIndex", {**sizes, **names, "rows": self._rows})
        figures = json.dumps(plots.to_json(self.statistics), indent=1)
        (self.folder / "statistics.json").write_text(figures + "\n", encoding="ascii")
        path = self.folder / "index.html"
        path.write_text(render(self.title, self.statistics), encoding="utf-8")
        return path

    def _row(self, entry: Mapping[str, Any]) -> list[Any]:
        """A record's fields for the filters: id, completions, reasons.

        A completion has [type, source, words, best, margin], and blind preference and seeing margin if it was measured.
        """
        types, sources, reasons = self._names.values()
        completions = [
            [types.number(c["type"]), sources.number(c["source"]), c["words"], int(c["best"]), c["margin"]]
            + ([c["blind"], c["seeing"]] if "blind" in c else [])
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
        # ASCII JSON without `<` is valid in a script and cannot contain `</script>`.
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        (self.folder / name).write_text(f"{function}({text});\n", encoding="ascii")


class _Names:
    """Numbers the names, so that the index stores each name once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


def searched_text(entry: Mapping[str, Any]) -> str:
    """Id, file names, prompt, completions with their donors, and refused texts, normalised for the page's search."""

    def response(completion: Mapping[str, Any]) -> str:
        return "".join(segment[1] for segment in completion["segments"] if segment[0] in "=+~")

    names: Iterable[str] = (entry["id"], *(image["name"] for image in entry["images"]))
    texts = (
        *(turn["text"] for turn in entry["prompt"]),
        *map(response, entry["completions"]),
        *(c["provenance"]["donor"] for c in entry["completions"] if "donor" in c["provenance"]),
        *map(response, entry["refused"]),
    )
    return unicodedata.normalize("NFC", "\n".join((*names, *texts)).lower())


def prepare_folder(folder: Path) -> None:
    """Creates the folder of a page, or removes the previous page from it.

    Raises:
        ValueError: The folder is not empty and contains no page.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "view.js").exists():
            raise ValueError(f"{folder} contains files that are not a page; give another folder with --out")
        (folder / "index.html").unlink(missing_ok=True)  # until the new page is complete
        for name in ("data", "images"):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("data", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        shutil.copyfile(str(_asset(name)), folder / name)


def render(title: str, statistics: Statistics) -> str:
    """The HTML: head with the policy, statistics, and empty elements that the script fills."""
    fill = {
        "policy": POLICY,
        "title": html.escape(title),
        "lead": plots.lead(statistics),
        "charts": plots.overview(statistics),
        "sources": plots.by_source(statistics),
        "left_out": plots.left_out(statistics.problems),
    }
    template = _asset("view.html").read_text(encoding="utf-8")
    # In one pass: a title may contain a placeholder of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda placeholder: str(fill[placeholder.group(1)]), template)


def _asset(name: str) -> Any:
    return files("bpo.tools.view").joinpath("assets").joinpath(name)
