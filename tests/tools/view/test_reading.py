"""Bad records, refusals and scores by record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.tools.view.run import main
from tests.tools.view.sample_page import HOSTILE, entries, view

ARGUMENTS = ("--no-images", "--workers", "1")


def spoil(data: Path, *lines: str) -> Path:
    """Inserts `lines` in the middle of a file."""
    whole = data.read_text().splitlines()
    data.write_text("\n".join([*whole[:3], *lines, *whole[3:]]) + "\n")
    return data


def test_a_bad_record_is_skipped_and_listed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(data, "{torn", json.dumps({"id": HOSTILE, "completions": []}))
    page = view(data, *ARGUMENTS)
    assert len(entries(page)) == 61
    lines = [json.loads(line) for line in (page / "quarantine.jsonl").read_text().splitlines()]
    assert [line["code"] for line in lines] == ["not-json", "wrong-type"]
    assert "skipped 2 bad records" in capsys.readouterr().err
    html = (page / "index.html").read_text()
    assert "2 bad, skipped" in html and "&lt;script&gt;window" in html and "<script>window" not in html
    data.write_text("".join(line + "\n" for line in data.read_text().splitlines() if "A dog" in line))
    assert not (view(data, *ARGUMENTS) / "quarantine.jsonl").exists()  # the list of the older page


def test_error_stops_at_the_first_bad_record(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(data, "{torn")
    assert main([str(data), *ARGUMENTS, "--out", str(data.parent / "page"), "--on-bad", "error"]) == 1
    assert "line 4" in capsys.readouterr().err
    assert not (data.parent / "page" / "index.html").exists()


def test_too_many_bad_records_stop_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(data, *["{torn"] * 7)
    assert main([str(data), *ARGUMENTS, "--out", str(data.parent / "page")]) == 1
    assert "7 of 67 records are bad" in capsys.readouterr().err
    assert main([str(data), *ARGUMENTS, "--out", str(data.parent / "page"), "--max-bad-share", "0.2"]) == 0
    assert main([str(data), *ARGUMENTS, "--out", str(data.parent / "page"), "--max-bad-share", "2"]) == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', '{"id": 3, "source": "x", "reason": "y"}', '"\\ud800"'])
def test_bad_lines_of_refusals_are_skipped(data: Path, line: str) -> None:
    spoil(data.with_name("groups.jsonl.refused.jsonl"), line)
    page = view(data, *ARGUMENTS, "--max-bad-share", "0.4")
    assert sum(len(entry["refused"]) for entry in entries(page)) == 2
    assert "refused.jsonl, line" in (page / "quarantine.jsonl").read_text()


def completion(**more: Any) -> str:
    whole = {"response": "x", "tokens": ["x"], "policy": [0], "reference": [0], **more}
    return json.dumps({"id": "a", "completions": [whole]})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"id": "a"}',
        completion(policy=[]),
        completion(policy=["x"]),
        completion(tokens=[1]),
        completion(response=None),
        completion(reference=[float("nan")]),
        '{"id": "a", "completions": [{"resp',
    ],
)
def test_bad_lines_of_scores_are_reported_by_number(data: Path, line: str) -> None:
    scores = spoil(data.with_name("scores.jsonl"), line)
    page = view(data, *ARGUMENTS, "--scores", str(scores))
    assert sum("tokens" in entry["completions"][0] for entry in entries(page) if entry["completions"]) == 10
    assert "scores.jsonl, line 4" in (page / "quarantine.jsonl").read_text()
    arguments = [str(data), *ARGUMENTS, "--scores", str(scores), "--out", str(page)]
    assert main([*arguments, "--on-bad", "error"]) == 1
    assert main([*arguments, "--max-bad-share", "0.05"]) == 1


def test_scores_of_other_groups_cause_a_warning(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = data.with_name("scores.jsonl")
    scores.write_text(scores.read_text().replace('"r0', '"q0'))
    view(data, *ARGUMENTS, "--scores", str(scores))
    assert "is it the right file?" in capsys.readouterr().err
    assert main([str(data), *ARGUMENTS, "--scores", str(data.with_name("no.jsonl"))]) == 1
    assert "no.jsonl is missing" in capsys.readouterr().err
