"""Pytest plugin that writes the outcome of every test as soon as it is known, so that a stopped session keeps them.

    BPO_TEST_LINES=FILE python -m pytest -p benchmarks.gpu_set.recorder ...

One JSON line per test: file, name, outcome (passed, failed, skipped), seconds, and the message unless it passed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LINES_VARIABLE = "BPO_TEST_LINES"
MESSAGE_CHARACTERS = 600
FAILURES_SHOWN = 20


def _write(line: dict[str, Any]) -> None:
    # Under xdist every report is forwarded to the controller; writing in the workers too would duplicate it.
    if LINES_VARIABLE in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ[LINES_VARIABLE], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"file": report.nodeid.partition("::")[0], "name": report.nodeid, "outcome": report.outcome}
    line["seconds"] = round(report.duration, 3)
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        line["message"] = report.longrepr[2]
    elif report.outcome == "failed":
        line["message"] = report.longreprtext[-MESSAGE_CHARACTERS:]
    _write(line)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        name = report.nodeid or "collection"
        line = {"file": name.partition("::")[0], "name": name, "outcome": "failed", "seconds": 0.0}
        _write(line | {"message": report.longreprtext[-MESSAGE_CHARACTERS:]})


def summary(path: Path) -> dict[str, dict[str, Any]]:
    """Per file: numbers of passed, failed and skipped tests, their seconds, failures, and reasons for skipping."""
    files: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the last line of a session that was killed
            continue
        empty = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "reasons": []}
        found = files.setdefault(line["file"], empty)
        found[line["outcome"]] += 1
        found["seconds"] = round(found["seconds"] + line["seconds"], 3)
        if line["outcome"] == "failed" and len(found["failures"]) < FAILURES_SHOWN:
            found["failures"].append({"name": line["name"], "message": line["message"]})
        reason = line.get("message", "")
        if line["outcome"] == "skipped" and reason not in found["reasons"]:
            found["reasons"].append(reason)
    return files
