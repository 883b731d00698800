"""The page in a headless browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import Tab, needs_browser
from tests.tools.view.sample_page import HOSTILE, view, write_lines, write_pictures
from tests.tools.view.test_serve import served

pytestmark = needs_browser


def texts_of(tab: Tab, selector: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def shown(tab: Tab, count: int) -> None:
    tab.until(f"document.querySelectorAll('article').length === {count}")


def ids(tab: Tab) -> list[str]:
    return texts_of(tab, "article h2 bdi")


def passing(tab: Tab, address: str) -> int:
    """Records that pass the filters of an address."""
    tab.run(f"""new Promise(done => {{
        const before = location.hash;
        location.hash = '{address}';
        if (location.hash === before) done();
        else addEventListener('hashchange', () => setTimeout(done), {{once: true}});
    }})""")
    tab.until("!!document.querySelector('[aria-busy=false]')")
    text = tab.run("document.getElementById('status').textContent")
    return 0 if "no record" in text else int(text.split(" of ")[1].split()[0])


@pytest.fixture
def opened(page: Path, tab: Tab) -> Tab:
    tab.events.clear()
    tab.open("about:blank")
    tab.open(f"file://{page}/index.html")
    shown(tab, 20)
    return tab


def test_groups_pictures_and_diffs_are_shown_and_no_text_runs(opened: Tab, tmp_path: Path) -> None:
    tab = opened
    assert ids(tab)[0] == "r000"
    assert texts_of(tab, "article:first-of-type .change del")[0] == "dog"
    assert texts_of(tab, "article:first-of-type .change ins mark") == ["zebra"]
    assert texts_of(tab, "article:first-of-type .completion .type") == ["gt", "llm-hal", "mllm-hal"]
    facts = texts_of(tab, "article:first-of-type .facts")
    assert (
        facts[0].startswith("score 1 \u00b7 5 words") and "weakened-image \u00b7 noise step 900 \u00b7 seed 0" in facts
    )
    assert "missing" in texts_of(tab, "article:nth-of-type(3) .problem")[0]
    images = "[...document.querySelectorAll('article:first-of-type img')]"
    assert tab.run(f"{images}.length") == 2
    tab.until(f"{images}.every(i => i.complete && i.naturalWidth > 0)")
    assert "unchanged" in texts_of(tab, "article:nth-of-type(2) .refused")[0]
    for count in (20, 20, 1):  # the last is the record without a group
        tab.screenshot(tmp_path / "page.png")
        if count == 1:
            tab.until("document.body.textContent.includes('onerror=window.pwned')")
        tab.press("n")
        tab.until("!document.getElementById('previous').disabled")
        shown(tab, count)
    assert tab.run("window.pwned") is None
    assert tab.run("document.querySelectorAll('main script, main img[onerror]').length") == 0
    assert tab.complaints() == []
    assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_an_injected_script_would_be_stopped_by_the_policy(opened: Tab) -> None:
    """Even if text were inserted as markup, the policy of the page would block it."""
    tab = opened
    tab.run("document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=window.pwned=3>'); 0")
    tab.run("const s = document.createElement('script'); s.textContent = 'window.pwned=4'; document.body.append(s); 0")
    while not any("Content Security Policy" in text for text in tab.complaints()):
        tab.run("new Promise(done => setTimeout(done, 20))")
    assert tab.run("window.pwned") is None


def test_the_served_page_is_the_same(page: Path, tab: Tab) -> None:
    tab.events.clear()
    with served(page) as port:
        tab.open(f"http://127.0.0.1:{port}/#search=zebra+and+7")
        shown(tab, 1)
        tab.until("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        tab.open("about:blank")
    assert tab.complaints() == []


def test_filters_combine_and_are_in_the_url(opened: Tab) -> None:
    tab = opened
    for address, count in (
        ("refused=reason%3Ainject%3A+unchanged", 1),
        ("refused=source%3Aweaken", 1),
        ("refused=any", 2),
        ("refused=none", 59),
        ("search=7+cats", 6),
        ("search=GONE", 1),
        ("search=1.png&source=type%3Amllm-hal", 20),
        ("source=type%3Amllm-hal&search=r05", 9),  # not r059
        ("source=source%3Aweakened-image", 59),
        ("source=source%3Ainjected-errors", 60),
        ("max-words=4&search=dog", 0),
        ("length-of=negative&max-words=3", 59),
        ("length-of=negative&max-words=3&source=type%3Allm-hal", 0),
        ("length-of=best&max-words=3", 0),
        ("length-of=best&max-words=5", 60),
        ("max-margin=-1", 9),
        ("max-margin=-1&source=type%3Amllm-hal", 0),  # of that negative it is positive
        ("min-margin=1&source=type%3Amllm-hal&refused=any", 1),
        ("source=type%3Ano-such", 61),
    ):
        assert passing(tab, address) == count, address
    assert passing(tab, "order=margin") == 61
    assert ids(tab)[0] == "r009"
    assert tab.run("location.hash") == "#order=margin"
    options = tab.run("[...document.getElementById('source').options].map(o => o.textContent)")
    assert options[1:] == [
        *("gt (60)", "llm-hal (60)", "mllm-hal (59)"),
        *("annotation (60)", "injected-errors (60)", "weakened-image (59)"),
    ]


def test_search_matches_are_highlighted_across_a_diff(opened: Tab) -> None:
    tab = opened
    assert passing(tab, "search=a+zebra+and+7") == 1
    assert tab.run("[...CSS.highlights.get('found')].map(r => r.toString())") == ["A ", "zebra", " ", "and 7"]


def test_the_keyboard_does_everything(opened: Tab) -> None:
    tab = opened
    for _ in range(3):
        tab.press("j")
    tab.press("k")
    focus = "document.activeElement.getAttribute('aria-label')"
    tab.equals(focus, "r001")
    for _ in range(20):
        tab.press("j")  # as fast as a held key
    tab.equals(focus, "r021")
    tab.equals("location.hash", "#page=2")
    tab.press("t")
    shown_of = "['ratios', 'diff-legend', 'ratio-legend'].map(id => document.getElementById(id))"
    tab.equals(f"{shown_of}.map(element => element.checked ?? element.hidden)", [True, True, False])
    tab.press("/")
    tab.equals("document.activeElement.id", "search")
    for key in "r003":
        tab.press(key)
    shown(tab, 1)
    tab.press("Escape")
    tab.equals("document.querySelectorAll('main .token.more').length", 2 * 5 + 2)  # three nats per token
    tab.equals("document.activeElement.id", "")
    tab.press("Escape")
    shown(tab, 20)
    tab.press("r")
    tab.until("location.hash.includes('order=random') && !!document.querySelector('[aria-busy=false]')")
    first = ids(tab)
    assert first != sorted(first)
    tab.reload()
    shown(tab, 20)
    assert ids(tab) == first  # the sample has an address
    tab.press("s")
    tab.equals("document.getElementById('statistics').open", False)
    tab.press("f")
    tab.equals("document.activeElement.id", "source")
    tab.press("Escape")
    tab.equals("document.activeElement.id", "")
    tab.press("?")
    tab.equals("document.querySelector('#help').open", True)
    tab.press("Escape")
    tab.equals("document.querySelector('#help').open", False)


def test_a_new_page_starts_at_the_top_and_the_focus_is_never_covered(opened: Tab) -> None:
    tab = opened
    tab.run("scrollTo(0, document.body.scrollHeight); new Promise(done => setTimeout(done, 50))")
    tab.press("n")
    tab.until("location.hash === '#page=2' && document.querySelector('h2 bdi').textContent === 'r020'")
    edges = "['#filters', 'article'].map(s => document.querySelector(s).getBoundingClientRect())"
    tab.until(f"(([bar, first]) => first.top >= bar.bottom && first.top < innerHeight / 2)({edges})")
    for _ in range(3):
        tab.press("j")
    tab.until("document.activeElement.getAttribute('aria-label') === 'r022'")
    covered = "(([bar, article]) => article.top < bar.bottom)(['#filters', 'article:focus']"
    assert not tab.run(f"{covered}.map(s => document.querySelector(s).getBoundingClientRect()))")


def test_added_dropped_and_changed_differ_without_colour(tmp_path: Path, tab: Tab) -> None:
    one = {"response": "A big dog on the old sofa.", "score": 1, "type": "gt"}
    groups = [
        {
            "id": "g",
            "images": [],
            "prompt": "?",
            "completions": [one, {**one, "score": 0, "response": "A big cat on the sofa here."}],
        }
    ]
    page = view(write_lines(tmp_path / "g.jsonl", groups))
    tab.open(f"file://{page}/index.html")
    shown(tab, 1)
    style = "getComputedStyle(document.querySelector('main {}')).{}"
    lines = [tab.run(style.format(s, "textDecorationLine")) for s in (".text > ins", ".text > del", ".change ins")]
    assert lines == ["underline", "line-through", "none"]
    assert tab.run(style.format(".change", "borderTopStyle")) == "solid"
    assert texts_of(tab, "main .change") == ["dog\u2192cat"]
    assert texts_of(tab, "#diff-legend > span > :is(ins, del, .change)") == [
        "added",
        "dropped",
        "changed\u2192into",
    ]


def awkward_groups() -> list[dict[str, Any]]:
    """Texts that can break pages: control characters, right-to-left, long texts, many completions, hostile names."""
    texts = [
        "a\u0000b\u001bc\u202eevil",
        "كلب أسود على الأريكة",
        "w " * 5000,
        "一只猫",
        "👨‍👩‍👧 😀",
        "'\"><b onclick=x>",
    ]
    names = [HOSTILE, "x" * 3000, "\u202eevil", "'\"&lt;", "a b/c.png?#", "\u0007"]
    groups = []
    for number, (text, name) in enumerate(zip(texts, names, strict=True)):
        completions = [{"response": text, "score": 1, "type": f"gt {name}"[:50]}]
        completions += [{"response": f"{text} {n}", "score": -n, "type": f"t{n}"} for n in range(1, 11)]
        groups.append({"id": f"{name} {number}", "images": ["0.png", name], "prompt": text, "completions": completions})
    return groups


def test_awkward_texts_do_not_break_the_layout(tmp_path: Path, tab: Tab) -> None:
    write_pictures(tmp_path, 1)
    page = view(write_lines(tmp_path / "g.jsonl", awkward_groups()))
    tab.events.clear()
    tab.open(f"file://{page}/index.html", width=400)
    shown(tab, 6)
    assert tab.run("window.pwned") is None and tab.complaints() == []
    assert tab.run("document.documentElement.scrollWidth") <= 400  # no overflow
    assert tab.run("Math.max(...[...document.querySelectorAll('.text.long')].map(e => e.clientHeight))") < 500
    first = texts_of(tab, "article:nth-of-type(1) .text")[0]
    assert first == "a\u2400b\u241bc\u27e8U+202E\u27e9evil"
    assert tab.run("getComputedStyle(document.querySelector('article:nth-of-type(2) .text')).direction") == "rtl"
    assert "\u202e" not in tab.run("document.body.textContent")
    assert tab.run("document.querySelectorAll('article:nth-of-type(4) .text ins').length") == 10
    for address in ("search=%E7%8C%AB", "source=type%3At10&search=xxx", "length-of=negative&min-words=5000"):
        assert passing(tab, address) >= 1


def test_missing_data_files_are_reported(opened: Tab, page: Path) -> None:
    tab = opened
    (page / "data" / "00002.js").unlink()
    tab.open("about:blank")
    tab.open(f"file://{page}/index.html")
    shown(tab, 20)
    tab.press("n")
    tab.equals("document.querySelector('h2 bdi').textContent", "r020")
    tab.press("n")
    tab.equals("document.getElementById('status').textContent", "data/00002.js cannot be read")
