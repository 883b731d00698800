"""The page of `bpo view`, its parts and in a browser. Run: python -m pytest tests/viewing/test_page.py"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bpo.bootstrap.changes import load_lexicon
from bpo.data.formats import group_to_json
from bpo.records import Completion, ContentPart, PreferenceGroup, Provenance, Turn
from bpo.viewing.diff import diff_segments, plain_segments
from bpo.viewing.entries import ViewError, read_scores
from bpo.viewing.run import main
from bpo.viewing.serve import server_of
from tests.browser import Tab, browser_tab, needs_browser

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>"
OBJECTS = load_lexicon().objects


def group(number: int, annotation: str, negatives: dict[str, str], prompt: str = "Describe it.") -> PreferenceGroup:
    sources = {"mllm-hal": "weakened-image", "llm-hal": "injected-errors"}
    completions = [Completion(annotation, 1.0, "gt", Provenance("annotation"))]
    for kind, text in negatives.items():
        noise = 900 if kind == "mllm-hal" else None
        completions.append(Completion(text, 0.0, kind, Provenance(sources[kind], noise_step=noise, seed=number)))
    turn = Turn("user", (ContentPart("image"), ContentPart("text", prompt)))
    return PreferenceGroup(f"r{number:03}", (f"{number % 3}.png",), (turn,), tuple(completions))


def scored(completion: Completion, gain: float) -> dict[str, Any]:
    """Every token `gain` nats likelier than the reference has it; of injected errors, twice that."""
    tokens = completion.response.split(" ")
    gain *= 2 if completion.type == "llm-hal" else 1
    reference = [-1.0] * len(tokens)
    return {
        "response": completion.response,
        "tokens": tokens,
        "policy": [value + gain for value in reference],
        "reference": reference,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 groups, one of them hostile, two refusals (one of a record without a group), scores of ten groups."""
    for number in range(2):  # the third image is missing
        pixels = np.full((90, 120, 3), 200 - 150 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    negatives = [{"llm-hal": f"A zebra and {n} cats.", "mllm-hal": "A dog."} for n in range(59)]
    groups = [group(n, f"A dog and {n} cats.", negatives[n]) for n in range(59)]
    groups.append(group(59, f"A dog. {HOSTILE}", {"llm-hal": f"{HOSTILE} A cat."}, prompt=HOSTILE))
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(group_to_json(one)) + "\n" for one in groups))
    refused = [
        {"id": "r001", "source": "inject", "reason": "unchanged", "detail": "it is the annotation", "text": HOSTILE},
        {"id": "gone", "source": "weaken", "reason": "empty", "detail": "there is no text", "text": ""},
    ]
    (tmp_path / "groups.jsonl.refused.jsonl").write_text("".join(json.dumps(one) + "\n" for one in refused))
    scores = [
        {"id": one.id, "completions": [scored(c, n) for c in one.completions]} for n, one in enumerate(groups[:10])
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(one) + "\n" for one in scores))
    return path


@pytest.fixture
def page(data: Path) -> Path:
    arguments = ["--image-root", str(data.parent), "--out", str(data.parent / "page"), "--workers", "1"]
    assert main([str(data), *arguments, "--scores", str(data.parent / "scores.jsonl")]) == 0
    return data.parent / "page"


def joined(segments: list[list[str]], ops: str) -> str:
    return "".join(segment[1] for segment in segments if segment[0] in ops)


def test_a_diff_tells_what_is_added_dropped_and_which_objects_are_named() -> None:
    segments = diff_segments("A big dog sits.", "A big brown cat sits here.", OBJECTS)
    assert [s[:2] for s in segments if s[0] == "-"] == [["-", "dog"]]
    assert [s[1] for s in segments if s[0] == "+"] == ["brown ", "cat", "here"]
    assert ["+", "cat", "cat"] in segments
    assert plain_segments("Two dogs.", OBJECTS) == [["=", "Two "], ["=", "dogs", "dog"], ["=", "."]]


texts = st.text(alphabet="ab .\n<&'-日é", max_size=40)


@given(texts, texts)
def test_a_diff_holds_both_texts(annotation: str, response: str) -> None:
    segments = diff_segments(annotation, response, OBJECTS)
    assert joined(segments, "=+") == response
    dropped = "".join("".join(s[1].split()) for s in segments if s[0] in "=-")
    assert dropped.casefold() == "".join(annotation.split()).casefold()


def test_no_text_of_the_data_stands_in_the_html_and_none_ends_a_script(page: Path) -> None:
    assert "pwned" not in (page / "index.html").read_text()
    scripts = [path.read_text(encoding="ascii") for path in (page / "data").iterdir()]
    assert any("pwned" in script for script in scripts) and not any("<" in script for script in scripts)


def test_weakened_pictures_are_made_from_the_provenance(page: Path) -> None:
    names = ("0000000.jpg", "0000000-2.jpg")
    clean, weak = (np.asarray(Image.open(page / "images" / name)).astype(int) for name in names)
    assert clean.std() < 5 and weak.std() > 40
    assert clean.shape == weak.shape == (90, 120, 3)


def test_a_folder_that_holds_something_else_is_left_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data.parent / "mine").mkdir()
    (data.parent / "mine" / "thesis.txt").write_text("x")
    assert main([str(data), "--no-images", "--out", str(data.parent / "mine")]) == 1
    assert "holds something that is no page" in capsys.readouterr().err
    assert [p.name for p in (data.parent / "mine").iterdir()] == ["thesis.txt"]


def test_a_page_may_be_made_again_and_a_sample_is_the_same_each_time(data: Path) -> None:
    out = data.parent / "page"
    ids = []
    for _ in range(2):
        assert main([str(data), "--no-images", "--out", str(out), "--limit", "7"]) == 0
        ids.append((out / "data" / "index.js").read_text())
    assert ids[0] == ids[1] and ids[0].count('"r0') == 7


UNEVEN = {"id": "a", "completions": [{"response": "x", "tokens": ["x"], "policy": [], "reference": [0]}]}


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', json.dumps(UNEVEN)])
def test_scores_of_another_form_are_refused_by_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": "b", "completions": []}\n' + line + "\n")
    with pytest.raises(ViewError, match=r"s\.jsonl, line 2"):
        read_scores(tmp_path / "s.jsonl")


@contextmanager
def served(folder: Path) -> Iterator[int]:
    with server_of(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_the_server_gives_its_own_files_to_its_own_machine_alone(page: Path) -> None:
    def ask(port: int, path: str, host: str | None = None, method: str = "GET") -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{port}")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    with served(page) as port:
        status, headers, body = ask(port, "/")
        assert status == 200 and b"groups.jsonl" in body
        assert "script-src 'self';" in headers["Content-Security-Policy"]
        assert ask(port, "/data/index.js")[0] == 200
        assert ask(port, "/", host="evil.example")[0] == 403
        assert ask(port, "/data/")[0] == 404
        assert ask(port, "/../groups.jsonl")[0] == 404
        assert ask(port, "/%2e%2e/groups.jsonl")[0] == 404
        assert ask(port, "/", method="POST")[0] == 501


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser_tab() as tab:
        yield tab


def texts_of(tab: Tab, selector: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def shown(tab: Tab, count: int) -> None:
    tab.until(f"document.querySelectorAll('article').length === {count}")


@needs_browser
def test_a_browser_shows_groups_pictures_diffs_and_runs_no_text(page: Path, tab: Tab, tmp_path: Path) -> None:
    tab.events.clear()
    tab.open(f"file://{page}/index.html")
    shown(tab, 20)
    assert texts_of(tab, "article h2")[0].startswith("r000")
    assert texts_of(tab, "article:first-of-type del")[0] == "dog"
    assert texts_of(tab, "article:first-of-type ins mark") == ["zebra"]
    assert "missing" in texts_of(tab, "article:nth-of-type(3) .problem")[0]
    images = "[...document.querySelectorAll('article:first-of-type img')]"
    assert tab.run(f"{images}.length") == 2
    tab.until(f"{images}.every(i => i.complete && i.naturalWidth > 0)")
    assert "unchanged" in texts_of(tab, "article:nth-of-type(2) .refused")[0]
    tab.press("n")
    shown(tab, 20)
    tab.press("n")
    shown(tab, 20)
    tab.press("n")
    shown(tab, 1)  # the record without a group
    tab.press("p")
    tab.until("document.body.textContent.includes('onerror=window.pwned')")
    assert tab.run("window.pwned") is None
    assert tab.run("document.querySelectorAll('main script, main img[onerror]').length") == 0
    assert tab.complaints() == []
    tab.screenshot(tmp_path / "page.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


@needs_browser
def test_an_injected_script_would_be_stopped_by_the_policy(page: Path, tab: Tab) -> None:
    """Were a text ever put in as markup, the policy of the page would not let it run."""
    tab.events.clear()
    tab.open(f"file://{page}/index.html")
    shown(tab, 20)
    tab.run("document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=window.pwned=3>'); 0")
    tab.run("const s = document.createElement('script'); s.textContent = 'window.pwned=4'; document.body.append(s); 0")
    tab.run("new Promise(done => setTimeout(done, 200))")
    assert tab.run("window.pwned") is None
    assert any("Content Security Policy" in text for text in tab.complaints())


@needs_browser
def test_filters_and_their_address(page: Path, tab: Tab) -> None:
    tab.open(f"file://{page}/index.html#reason=inject%3A+unchanged")
    shown(tab, 1)
    assert texts_of(tab, "article h2")[0].startswith("r001")
    for query, count in (
        ("search=7+cats", 6),
        ("type=mllm-hal&search=r05", 9),
        ("max-words=4&search=dog", 0),
        ("search=gone", 1),
    ):
        tab.run(f"location.hash = '{query}'; 0")
        shown(tab, count)
    tab.run("location.hash = 'order=margin'; 0")
    tab.until("document.querySelector('article h2').textContent.startsWith('r009')")
    tab.run("location.hash = 'max-margin=-1'; 0")
    shown(tab, 9)


@needs_browser
def test_the_keyboard_does_everything(page: Path, tab: Tab) -> None:
    tab.open(f"file://{page}/index.html")
    shown(tab, 20)
    for _ in range(3):
        tab.press("j")
    tab.press("k")
    assert tab.run("document.activeElement.getAttribute('aria-label')") == "r001"
    for _ in range(20):
        tab.press("j")
        tab.run("new Promise(done => setTimeout(done))")
    tab.until("document.activeElement.getAttribute('aria-label') === 'r021'")
    tab.press("t")
    tab.until("document.querySelector('#ratios').checked")
    tab.press("/")
    assert tab.run("document.activeElement.id") == "search"
    for key in "r003":
        tab.press(key)
    shown(tab, 1)
    tab.press("Escape")
    assert len(texts_of(tab, ".token.more")) == 2 * 5 + 2  # three nats a token
    tab.press("Escape")
    shown(tab, 20)
    tab.press("r")
    tab.until("location.hash.includes('order=random')")
    first = texts_of(tab, "article h2")
    assert first != sorted(first)
    tab.run("location.reload(); 0")
    tab.until("document.readyState === 'complete'")
    shown(tab, 20)
    assert texts_of(tab, "article h2") == first  # the sample has an address
    tab.press("?")
    assert tab.run("document.querySelector('#help').open")
    tab.press("Escape")
