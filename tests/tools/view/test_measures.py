"""Measures on the page: plots of each type, values and telling words of each record, filters and order."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap.measure.text import TextMeasures, measures_to_json
from bpo.config.measure import MeasureConfig
from bpo.formats.files import group_to_json
from bpo.records import Completion, PreferenceGroup, Provenance
from bpo.tools.measures import read_measures
from bpo.tools.view.measures import telling_words
from tests.browser import Tab, needs_browser
from tests.tools.view.sample_page import HOSTILE, entries, group, view, write_lines, write_pictures
from tests.tools.view.test_page_browser import ids, passing, shown, texts_of

NUM_RECORDS = 45


def records() -> list[PreferenceGroup]:
    """In every rejected answer of `llm-hal` there is a zebra; `swap` is balanced."""
    found = []
    for n in range(NUM_RECORDS):
        record = group(n, f"A dog and {n} cats.", {"llm-hal": f"A zebra and {n} cats."})
        partner = n + 1 if n % 2 == 0 else n - 1
        text = f"A dog and {partner} cats."
        swapped = Completion(text, 0.0, "swap", Provenance("other-annotation", donor=f"r{partner:03}"))
        found.append(replace(record, completions=(*record.completions, swapped)))
    return found


def values(record: PreferenceGroup, n: int) -> dict[str, Any]:
    """`llm-hal`: blind n / 2 - 2 nats, seeing n; `swap`: blind 0.25, seeing 3."""
    gains = {"gt": (0.0, 0.0), "llm-hal": (n / 2 - 2, -n), "swap": (0.25, -3.0)}
    completions = [
        {"response": c.response, "tokens": 9, "blind": -20 + gains[c.type][0], "seeing": -10.0 + gains[c.type][1]}
        for c in record.completions
    ]
    return {"id": record.id, "donors": [], "completions": completions}


def of_model(median: float) -> dict[str, Any]:
    margins = {"median": median, "share_above_zero": 0.25, "histogram": {"-2": 3, "0": 1, "1.5": 4}}
    return {"blind": margins, "seeing": margins, "image": margins}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Groups with the measures of their texts, and made-up ones of a model for ten records."""
    write_pictures(tmp_path)
    measures = TextMeasures(MeasureConfig())
    for record in records():
        measures.add_alone(record)
    tree = {
        "measures": measures_to_json(measures.measure()),
        "model": {"types": {"llm-hal": of_model(-1.6)}, "warnings": [f"llm-hal: {HOSTILE}"]},
    }
    (tmp_path / "groups.jsonl.measures.json").write_text(json.dumps(tree))
    write_lines(tmp_path / "groups.jsonl.measures.jsonl", [values(r, n) for n, r in enumerate(records()[:10])])
    return write_lines(tmp_path / "groups.jsonl", [group_to_json(record) for record in records()])


def test_measures_are_plotted_for_each_type(data: Path) -> None:
    folder = view(data, "--no-images")
    page = (folder / "index.html").read_text()
    assert 'aria-label="accuracy of the text alone: llm-hal 1.00; swap 0.' in page
    blocks = {m[1]: m[2] for m in re.finditer(r'<details class="source"><summary><b>(.*?)</b>(.*?)</details>', page)}
    assert list(blocks) == ["llm-hal", "swap"]
    facts = "text alone 1.00 ± 0.00 · blind -1.60 nats, above 0: 25 % · seeing -1.60 nats"
    assert facts in blocks["llm-hal"]
    assert "Log-probability without the image, rejected − preferred answer, nats: median -1.60" in blocks["llm-hal"]
    assert "8 values from -2 to 1.5, bins of 0.5" in blocks["llm-hal"] and 'class="reference"' in blocks["llm-hal"]
    assert "Text-only score" in blocks["swap"] and "without the image" not in blocks["swap"]
    assert '<p class="problem">llm-hal: &lt;/script&gt;' in blocks["llm-hal"] and page.count("<script") == 3
    figures = json.loads((folder / "statistics.json").read_text())["measures"]
    assert figures["llm-hal"]["blind"]["median"] == -1.6 and figures["llm-hal"]["accuracy"] == 1.0


def test_a_text_score_above_0_is_a_rejected_answer_that_looks_better(data: Path) -> None:
    text = read_measures(data)["llm-hal"].text
    assert text is not None and text.median < 0 and text.share_above_zero == 0.0
    assert max(text.histogram) < 0 and sum(text.histogram.values()) == NUM_RECORDS


def test_each_record_has_its_margins_and_the_words_that_tell(data: Path) -> None:
    found = entries(view(data, "--no-images"))
    annotation, injected, swapped = found[4]["completions"]
    assert "blind" not in annotation and (injected["blind"], injected["seeing"]) == (0.0, 4.0)
    assert (swapped["blind"], swapped["seeing"]) == (0.25, 3.0)
    counts = {
        word: (preferred, rejected) for ngram, preferred, rejected in injected["telling"] for word in ngram.split()
    }
    assert counts["zebra"] == (0, NUM_RECORDS) and counts["dog"] == (NUM_RECORDS, 0) and "cats" not in counts
    assert "telling" not in swapped and "telling" not in annotation
    assert "blind" not in found[20]["completions"][1]  # not in the sample
    assert telling_words("a dog", "a cat and a dog", {"a dog": (5, 0), "cat and": (0, 5)}) == [["cat and", 0, 5]]


def test_the_summary_of_a_bootstrapping_job_has_measures_of_texts(data: Path) -> None:
    path = data.parent / "groups.jsonl.measures.json"
    tree = json.loads(path.read_text())
    path.unlink()
    assert read_measures(data) == {}
    (data.parent / "groups.jsonl.summary.json").write_text(json.dumps({"kept": {}, "measures": tree["measures"]}))
    measures = read_measures(data)
    assert measures["llm-hal"].accuracy == 1.0 and measures["llm-hal"].blind is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"measures": {"a": {"text": {"accuracy": "x"}}}}', '{"model": {"types": 3}}']
)
def test_invalid_measures_are_named_and_left_out(data: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (data.parent / "groups.jsonl.measures.json").write_text(text)
    page = view(data, "--no-images")
    assert "measures.json" in capsys.readouterr().err and len(entries(page)) == NUM_RECORDS


def test_values_that_are_not_numbers_are_listed(data: Path) -> None:
    lines = data.parent / "groups.jsonl.measures.jsonl"
    bad = {"id": "r000", "completions": [{"response": "x", "seeing": "0", "blind": 0}]}
    write_lines(lines, [bad, *(values(record, n) for n, record in enumerate(records()[1:20], 1))])
    page = view(data, "--no-images")
    assert "blind" not in entries(page)[0]["completions"][1] and "blind" in entries(page)[1]["completions"][1]
    assert "a log-prob is not a finite number" in (page / "quarantine.jsonl").read_text()


@needs_browser
def test_records_are_filtered_and_ordered_by_their_margins(data: Path, tab: Tab) -> None:
    page = view(data, "--no-images")
    tab.events.clear()
    tab.open("about:blank")
    tab.open(f"file://{page}/index.html")
    shown(tab, 20)
    for address, count in (
        ("min-measure=0.3", 5),  # llm-hal of 5, 6, 7, 8, 9
        ("min-measure=0.2", 10),  # swap of all
        ("min-measure=0.2&source=type%3Allm-hal", 5),
        ("max-measure=-1.5&source=type%3Aswap", 0),
        ("measure-of=seeing&max-measure=3&source=type%3Allm-hal", 4),
        ("measure-of=image&min-measure=5&source=type%3Allm-hal", 5),  # 1.5 n - 2
        ("search=r003", 2),  # the record, and that with its annotation
    ):
        assert passing(tab, address) == count, address
    assert passing(tab, "order=blind") == NUM_RECORDS
    assert ids(tab)[:3] == ["r009", "r008", "r007"]
    passing(tab, "order=not-blind")
    assert ids(tab)[:2] == ["r000", "r001"]
    passing(tab, "order=seeing&source=type%3Allm-hal")
    assert ids(tab)[0] == "r000"
    facts = texts_of(tab, "article:first-of-type .facts")
    assert "score 0 \u00b7 5 words \u00b7 blind \u22122.00 \u00b7 seeing +0.00" in facts
    assert any(text.startswith("text alone tells: ") and "zebra rejected 45 : 0" in text for text in facts)
    tab.run("document.querySelector('article a').click()")
    tab.until("location.hash.includes('search=r001')")
    assert tab.complaints() == []


@needs_browser
def test_without_values_there_are_no_fields_for_them(data: Path, tab: Tab) -> None:
    (data.parent / "groups.jsonl.measures.jsonl").unlink()
    tab.open(f"file://{view(data, '--no-images')}/index.html")
    shown(tab, 20)
    assert tab.run("document.getElementById('min-measure').parentElement.hidden")
    assert tab.run("[...document.getElementById('order').options].map(o => o.value)") == ["file", "random", "words"]
