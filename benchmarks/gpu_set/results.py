"""The report of a run as one JSON file: written after each part, read to continue a run, merged from several runs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from bpo_kernels.bench.measure import machine

FORMAT = 2
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "accelerate", "numpy")
# Fields that must be equal for the parts of two runs to be combined in one report.
SAME = ("device", "quick", "machine.device", "machine.commit")


def new_report(device: str, quick: bool) -> dict[str, Any]:
    """An empty report with everything that the figures depend on."""
    about = {key: value for key, value in machine(torch.device(device)).items() if value != "not installed"}
    for package in PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    about["cores"] = len(os.sched_getaffinity(0))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["memory_gib"] = round(properties.total_memory / 2**30)
        about["multiprocessors"] = properties.multi_processor_count
        about["compute_capability"] = f"{properties.major}.{properties.minor}"
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "format": FORMAT,
        "date": f"{now:%Y-%m-%d}",
        "device": device,
        "quick": quick,
        "machine": about,
        "parts": {},
    }


def path_of(report: dict[str, Any], folder: Path) -> Path:
    """OUT/gpu-DEVICE-DATE.json."""
    name = re.sub(r"[^a-z0-9]+", "-", str(report["machine"]["device"]).lower()).strip("-")
    return folder / f"gpu-{name}-{report['date'].replace('-', '')}.json"


def write(path: Path, text: str) -> None:
    """Replaces a file atomically: if the process is killed while writing, the earlier file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_report(path: Path, report: dict[str, Any], page: str) -> None:
    """Writes the report as JSON, and `page` next to it as Markdown."""
    write(path, json.dumps(report, indent=1) + "\n")
    write(path.with_suffix(".md"), page)


def load(path: Path) -> dict[str, Any]:
    """Loads a report of this format.

    Raises:
        ValueError: the file is not such a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a report: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} is not a report of benchmarks/gpu.py: its format is not {FORMAT}")
    return report


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Differences that prevent the parts of two reports from being combined."""

    def value(report: dict[str, Any], name: str) -> Any:
        found: Any = report
        for key in name.split("."):
            found = found.get(key)
        return found

    pairs = ((name, value(one, name), value(other, name)) for name in SAME)
    return [f"{name} is {first} and {second}" for name, first, second in pairs if first != second]


def earlier(report: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the newest report in `folder` to which the parts of this run can be added."""
    for path in sorted(folder.glob("gpu-*.json"), reverse=True):
        try:
            found = load(path)
        except ValueError:
            continue
        if not differences(report, found):
            return path, found
    return None


def keep(parts: dict[str, Any], name: str, record: dict[str, Any]) -> None:
    """Stores the record of a part; a passed record is not replaced by one that did not pass."""
    if name in parts and parts[name]["status"] == "passed" and record["status"] != "passed":
        return
    parts[name] = record


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges the parts of all reports into one; later ones take precedence.

    Raises:
        ValueError: the reports have different devices or commits.
    """
    merged = reports[0] | {"parts": dict(reports[0]["parts"])}
    for report in reports[1:]:
        if found := differences(merged, report):
            raise ValueError(f"these reports cannot be merged: {'; '.join(found)}")
        merged["date"] = max(merged["date"], report["date"])
        for name, record in report["parts"].items():
            keep(merged["parts"], name, record)
    return merged
