"""Nothing that comes with data can write to a terminal's control channel."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from bpo.cli import main
from bpo.job.launch import Ranks, setup_logging
from bpo.job.terminal import printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x9b2K\u202e\u2066\x08"


def test_control_characters_are_escaped_and_text_is_kept() -> None:
    assert printable("Größe 面 ☃\n\ttab") == "Größe 面 ☃\n\ttab"
    assert printable("\x1b[2J\r\x9b\u202e\ud800\U000e0001") == "\\x1b[2J\\x0d\\x9b\\u202e\\ud800\\U000e0001"
    assert printable(Path("a")) == "a"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Groups whose ids, fields, image names and file name contain control characters; the second is bad."""
    answers = [{"response": text, "score": score, "type": HOSTILE} for text, score in (("A bus.", 1), ("A tram.", 0))]
    record = {"id": HOSTILE, "images": [f"{HOSTILE}.png"], "prompt": "What?", "completions": answers, HOSTILE: 1}
    path = tmp_path / "a\x1b[2J.jsonl"
    records = [record | {"images": ["0.png"]}, record | {"id": f"{HOSTILE}2", "completions": answers[:1]}, record]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    return path


@pytest.mark.parametrize(
    "command",
    [
        "check {path} --workers 1",
        "convert {path} {out}/g.json --on-bad quarantine --max-bad-share 1",
        "convert {path} {out}/g.json",
        "convert {path} {out}/g.parquet --on-bad quarantine",
        "view {path} --image-root {out} --out {out}/page --max-bad-share 1",
        "view {path} --image-root {out} --out {out}/page --on-bad error",
        "bootstrap --data.annotations {path} --data.groups {out}/g.jsonl --model.path {out}",
        "check {path}.missing",
    ],
)
def test_no_command_prints_them(hostile: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = command.format(path=hostile, out=hostile.parent).split(" ")
    main(arguments)
    printed = capfd.readouterr()
    text = printed.out + printed.err
    bars = text.replace("\x1b[A", "")  # a progress bar moves the cursor
    assert text and not {c for c in bars if not c.isprintable() and c not in "\n\t\r"}, repr(bars)
    assert "2J" not in text or "\\x1b[2J" in text


def test_logs_are_escaped_with_their_tracebacks(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        setup_logging(Ranks())
        logging.getLogger("bpo").warning("group %s is bad", HOSTILE)
        logging.getLogger("bpo").error("failed", exc_info=ValueError(HOSTILE))
    finally:
        root.handlers = before
    printed = capfd.readouterr().err
    assert "group a\\x1b]0;owned" in printed and printed.count("\\x1b[2J") == 2
    assert not {c for c in printed if not c.isprintable() and c != "\n"}
