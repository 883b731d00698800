"""`bpo evaluate --compare A.json B.json`: paired differences of two results, which must be of equal settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bpo.config.io import flat_tree
from bpo.evaluation.benchmarks.registry import BENCHMARKS
from bpo.evaluation.intervals import UnitCounts, paired_differences
from bpo.evaluation.tables import align, cells_of
from bpo.formats.jsonfiles import parse_json
from bpo.job.durable import write_durably
from bpo.job.exits import JobError

# Settings of the whole run; model, date, hardware, ranks and batch size may differ.
_RUN = ("dtype", "image_options", "system_prompt", "decoding")
# Options whose effect on the questions is in their digest.
_IN_DIGESTS = {"name", "images", "sample", "seed"}


class UnlikeResults(JobError):
    """Two results are of unlike settings, so that their difference would not be one of the models."""

    exit_code = 2


def compare(first: Mapping[str, Any], second: Mapping[str, Any], *, any_decoding: bool = False) -> dict[str, Any]:
    """Paired differences of all benchmarks that both results have.

    Args:
        first, second: What `run_evaluation` returns.
        any_decoding: Whether the decoding may differ.

    Returns:
        `benchmarks`: name -> metric -> `first`, `second`, `difference` (second - first), `low`, `high`; `notes`.

    Raises:
        UnlikeResults: Settings differ; names each field with both values.
    """
    theirs = [{_base_name(result): result for result in tree["benchmarks"]} for tree in (first, second)]
    shared = [name for name in theirs[0] if name in theirs[1]]
    if not shared:
        raise UnlikeResults(f"no benchmark is in both results: {', '.join(theirs[0])} and {', '.join(theirs[1])}")
    unlike = list(_differing(_run_settings(first, any_decoding), _run_settings(second, any_decoding)))
    for name in shared:
        settings = [_settings(results[name]) for results in theirs]
        unlike += [f"{name}, {fault}" for fault in _differing(*settings)]
    if unlike:
        raise UnlikeResults("the results are not comparable:\n  " + "\n  ".join(unlike))
    differences = {theirs[0][name]["name"]: _differences(theirs[0][name], theirs[1][name]) for name in shared}
    return {"benchmarks": differences, "notes": list(_notes(first, second, theirs))}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    counts = tuple(UnitCounts.from_json(result["counts"]) for result in (first, second))
    pairs = paired_differences(counts[0], counts[1], BENCHMARKS[first["type"]].metrics)
    values = [{name: value["value"] for name, value in result["metrics"].items()} for result in (first, second)]
    return {
        name: {"first": values[0][name], "second": values[1][name], "difference": difference, "low": low, "high": high}
        for name, (difference, low, high) in pairs.items()
    }


def _base_name(result: Mapping[str, Any]) -> str:
    """The name without the label, which must not differ."""
    return str(result["settings"]["options"]["name"] or result["type"])


def _run_settings(tree: Mapping[str, Any], any_decoding: bool) -> dict[str, Any] | None:
    """Settings under which the model answered; None if the answers came from a file."""
    if "answers" in tree:
        return None
    return flat_tree({name: tree[name] for name in _RUN if not (any_decoding and name == "decoding")})


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a benchmark; files by content, wherever they are."""
    settings = result["settings"]
    files = settings["files_sha256"]

    def names_files(value: Any) -> bool:
        paths = value if isinstance(value, list) else [value]
        return bool(paths) and all(
            path and any(Path(file).is_relative_to(str(path)) for file in files) for path in paths
        )

    return {
        "name": result["name"],
        **{
            key: value
            for key, value in settings["options"].items()
            if key not in _IN_DIGESTS and not names_files(value)
        },
        **{key: value for key, value in settings.items() if key not in ("options", "files_sha256")},
        "files": []
        if BENCHMARKS[result["type"]].files_follow_answers
        else sorted(f"{digest[:16]} ({Path(file).name})" for file, digest in files.items()),
    }


def _differing(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> Iterator[str]:
    if first is None or second is None:
        return
    for name in {**first, **second}:
        values = [settings.get(name, "missing") for settings in (first, second)]
        if values[0] != values[1]:
            yield f"{name}: {json.dumps(values[0])} / {json.dumps(values[1])}"


def _notes(
    first: Mapping[str, Any], second: Mapping[str, Any], theirs: list[dict[str, Mapping[str, Any]]]
) -> Iterator[str]:
    for number, tree in enumerate((first, second)):
        only = [name for name in theirs[number] if name not in theirs[1 - number]]
        which = ("first", "second")[number]
        if only:
            yield f"only in the {which} result: {', '.join(only)}"
        if "answers" in tree:
            yield f"the {which} result's answers came from a file: its dtype, image options and decoding are unknown"
    if first["versions"]["bpo"] != second["versions"]["bpo"]:
        yield f"scored by different versions: {first['versions']['bpo']} and {second['versions']['bpo']}"


def format_comparison(found: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The differences as aligned text; * marks those whose interval excludes 0."""
    kinds = {result["name"]: BENCHMARKS[result["type"]] for result in results["benchmarks"]}
    blocks = [f"note: {note}" for note in found["notes"]]
    for benchmark, metrics in found["benchmarks"].items():
        kind = kinds[benchmark]
        rows = [[f"{benchmark}", "first", "second", "difference", "", ""]]
        for name, at in metrics.items():
            values = [cells_of(kind, name, (at[side], 0, 0))[0] for side in ("first", "second")]
            sure = "*" if at["low"] > 0 or at["high"] < 0 else ""
            lower = "lower is better" if name in kind.lower_is_better else ""
            difference = cells_of(kind, name, (at["difference"], at["low"], at["high"]))
            rows.append([f"  {name}", *values, *difference, f"{sure} {lower}".strip()])
        blocks.append("\n".join(align(rows)))
    return "\n\n".join(blocks)


def main(argv: list[str]) -> int:
    """Runs `bpo evaluate --compare`; raises as `compare` does."""
    parser = argparse.ArgumentParser(prog="bpo evaluate", description=__doc__)
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RESULTS", required=True, help="two results files")
    parser.add_argument("--compare-decoding", action="store_true", help="the decoding may differ")
    parser.add_argument("--json", type=Path, help="file for the differences")
    options = parser.parse_args(argv)
    first, second = (_read(path) for path in options.compare)
    found = compare(first, second, any_decoding=options.compare_decoding)
    if options.json is not None:
        about = {"first": str(options.compare[0]), "second": str(options.compare[1])}
        write_durably(options.json, json.dumps({**about, **found}, indent=1) + "\n")
    print(format_comparison(found, first))
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if not isinstance(tree, dict) or not {"benchmarks", "versions"} <= set(tree):
        raise ValueError(f"{path} is not a results file of `bpo evaluate`; give its evaluation.output")
    return tree
