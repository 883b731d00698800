"""One run of the GPU set: runs the parts in order within the time limit and saves the report after each."""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_set import recorder
from benchmarks.gpu_set.parts import Part, Place, Setting
from benchmarks.gpu_set.process import Caches, Ended, run_process
from benchmarks.gpu_set.results import keep
from bpo_kernels.bench.cases import TEST_FILES

# Reserved for ending the last part and for the report, so that the run ends before --seconds.
RESERVE_SECONDS = 12.0
# A part is not started if less than this share of its estimated time is left.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Clock:
    """Start time of the run (`time.monotonic`) and its time limit in seconds."""

    begin: float
    total_s: float

    def left(self) -> float:
        """Seconds left for parts."""
        return self.total_s - RESERVE_SECONDS - (time.monotonic() - self.begin)


def unmet(part: Part, records: dict[str, dict[str, Any]]) -> str | None:
    """The reason why `part` must not run: a test that it needs fails. Tests that were not run block nothing."""
    for need in part.needs:
        name, _, operation = need.partition(":")
        record = records.get(name)
        if record is None:
            continue
        if not operation and record["status"] == "failed":
            return f"{name} failed"
        files = (record["report"] or {}).items() if operation else ()
        failed = sum(found["failed"] for file, found in files if Path(file).name in TEST_FILES[operation])
        if failed:
            return f"{failed} tests of {operation} fail"
    return None


def why_not(part: Part, setting: Setting, records: dict[str, dict[str, Any]], left_s: float) -> tuple[str, str] | None:
    """(status, reason) of a part that is not started, or None."""
    if reason := part.why_skipped():
        return "skipped", reason
    if reason := unmet(part, records):
        return "not run", reason
    least = part.estimate_s * LEAST_SHARE if setting.device == "cuda" else 1.0
    if left_s < least:
        return "not run", f"only {max(0.0, left_s):.0f} s left, it takes about {part.estimate_s:.0f}"
    return None


def run_part(part: Part, setting: Setting, seconds: float, caches: Caches, scratch: Path) -> dict[str, Any]:
    """Runs one part and returns its record: outcome, and its report as far as it was written."""
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        report = Path(folder) / ("lines.jsonl" if part.writes == "lines" else "report.json")
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        place = Place(report, temporary, seconds)
        environment = dict(part.environment) | caches.environment()
        # Files that a killed part leaves in its temporary folder (a model of 14 GB) are deleted with it.
        environment |= {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if part.writes == "lines":
            environment[recorder.LINES_VARIABLE] = str(report)
        ended = run_process(part.command(setting, place), seconds, environment)
        caches.remove_locks()
        return record_of(part, ended, _read(part, report))


def _read(part: Part, path: Path) -> Any:
    if part.writes == "lines":
        return recorder.summary(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # not yet written, or stopped while writing
        return None


def record_of(part: Part, ended: Ended, report: Any) -> dict[str, Any]:
    finished = datetime.datetime.now(datetime.timezone.utc)
    reason = {"failed": "see its output", "stopped": f"it ran for {ended.seconds:.0f} s"}.get(ended.status, "")
    return {
        "title": part.title,
        "status": ended.status,
        "seconds": ended.seconds,
        "reason": reason,
        "finished": f"{finished:%Y-%m-%dT%H:%M:%SZ}",
        "output_tail": ended.output_tail if ended.status != "passed" else "",
        "report": report,
    }


def run_parts(
    parts: list[Part],
    setting: Setting,
    report: dict[str, Any],
    clock: Clock,
    caches: Caches,
    scratch: Path,
    save: Callable[[], None],
    skip_done: bool = False,
) -> None:
    """Runs the parts and stores their records in `report["parts"]`; calls `save` after each."""
    records = report["parts"]
    for part in parts:
        if skip_done and records.get(part.name, {}).get("status") == "passed":
            print(f"{part.name}: skipped, it has already passed", flush=True)
            continue
        refusal = why_not(part, setting, records, clock.left())
        if refusal is not None:
            empty = {"title": part.title, "seconds": 0.0, "output_tail": "", "report": None}
            record = empty | dict(zip(("status", "reason"), refusal, strict=True))
        else:
            print(f"{part.name}: {part.title} ...", flush=True)
            left = clock.left()
            seconds = min(left, part.limit_s) if setting.device == "cuda" else left
            record = run_part(part, setting, seconds, caches, scratch)
        keep(records, part.name, record)
        save()
        why = f": {record['reason']}" if record["reason"] else ""
        print(f"{part.name}: {record['status']} in {record['seconds']:.0f} s{why}", flush=True)
        if record["status"] == "failed":
            print(record["output_tail"], flush=True)
