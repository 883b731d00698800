"""Cost of a bootstrapping job without its generation, for a thousand to a million annotations.

    python -m benchmarks.bootstrap_scale [--records 1000 1000000] [--json benchmarks/results/bootstrap-scale-cpu.json]

A LLaVA JSON list of descriptions of about 60 words, rewritten by an LLM that returns instantly. `job` is the whole of
`bpo bootstrap` (read, plan, claim, generate, validate, write durably, merge) in one process. `again` is a restart of
the finished job, by stage: read, plan, index the outcomes, look up every record, merge. Each runs in a separate process
for each number of records; memory is the peak resident memory minus that of the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bpo.bootstrap.engines.models import Generators
from bpo.bootstrap.engines.text import Reply
from bpo.bootstrap.inject import InjectionRequest
from bpo.bootstrap.job.merge import merge
from bpo.bootstrap.job.outcomes import OutcomeReader
from bpo.bootstrap.job.queue import build_queues, is_finished
from bpo.bootstrap.job.spool import AnnotationSpool
from bpo.bootstrap.run import run_bootstrap
from bpo.bootstrap.sources import InjectedErrors
from bpo.config.bootstrap import BootstrapConfig, InjectConfig, ServerConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import iterate_annotations
from bpo_kernels.bench.measure import machine

TEXT = "A man in a blue jacket rides a bicycle along a street with two parked cars and a red bus behind them. " * 3


def write_data(folder: Path, count: int) -> None:
    with (folder / "annotations.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"{number}: {TEXT}"}]
            record = {"id": f"r{number:09}", "image": f"{number}.jpg", "conversations": turns}
            file.write(("," if number else "") + json.dumps(record))
        file.write("]")


class InstantRewriter:
    """Replaces a text-only LLM: adds a zebra to every description."""

    name, whole_batches, special_tokens = "instant", False, ()

    def replies(self, requests: Sequence[InjectionRequest]) -> Iterator[tuple[int, Reply]]:
        for index, request in enumerate(requests):
            description = request.messages[-1].content.partition("Description: ")[2]
            yield index, Reply(f"{description} A zebra stands beside it.")


def rss_mib() -> float:
    """Peak resident memory of this process; `getrusage` would include the process it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def config_of(folder: Path) -> Config:
    data = DataConfig(
        annotations=str(folder / "annotations.json"), groups=str(folder / "groups.jsonl"), image_root=str(folder)
    )
    # No server is contacted: the rewriter replaces it.
    inject = InjectConfig(mode="description", server=ServerConfig(url="http://127.0.0.1:9/v1", model="instant"))
    return Config(data=data, bootstrap=BootstrapConfig(sources=["inject"], inject=inject))


def measure_job(folder: Path, count: int) -> dict[str, Any]:
    """Runs the whole job. Images are not checked, as if another source had already checked them."""
    Generators.text = lambda self: InstantRewriter()  # type: ignore[method-assign]
    InjectedErrors.prepare = lambda self, annotation: None  # type: ignore[method-assign]
    imports_mib, started = rss_mib(), time.perf_counter()
    summary = run_bootstrap(config_of(folder), progress=False)
    assert summary.num_groups == count, summary
    return {"job_s": time.perf_counter() - started, "job_mib": rss_mib() - imports_mib}


def measure_again(folder: Path, count: int) -> dict[str, Any]:
    """Restarts the finished job and times each stage."""
    config = config_of(folder)
    data = config.data
    figures: dict[str, Any] = {}
    imports_mib = rss_mib()
    at = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal at
        figures[f"{name}_s"], at = time.perf_counter() - at, time.perf_counter()

    bad = BadRecords.from_config(data)
    annotations = AnnotationSpool(iterate_annotations(Path(data.annotations), bad), 0, data.max_completion_words)
    lap("read")
    reader = OutcomeReader(folder / "groups.jsonl.parts")
    work = build_queues(annotations, config, reader)
    lap("plan")
    reader.poll()
    lap("index")
    assert is_finished(work)
    lap("look_up")
    summary = merge(config, annotations, reader, {}, {}, bad)
    lap("merge")
    assert summary.num_groups == count
    return figures | {"again_mib": rss_mib() - imports_mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=["job", "again"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        function = {"job": measure_job, "again": measure_again}[options.measure]
        print(json.dumps(function(options.folder, options.records[0])))
        return
    rows = []
    for count in options.records:
        row: dict[str, Any] = {"records": count}
        with tempfile.TemporaryDirectory() as temporary:
            write_data(Path(temporary), count)
            for part in ("job", "again"):
                command = [sys.executable, "-m", "benchmarks.bootstrap_scale", "--measure", part, "--folder", temporary]
                done = subprocess.run(
                    [*command, "--records", str(count)], stdout=subprocess.PIPE, text=True, check=True
                )
                row |= json.loads(done.stdout)
        rows.append(row)
        cells = (
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print("  ".join(cells), flush=True)
    if options.json:
        command_line = " ".join(["python -m benchmarks.bootstrap_scale", *sys.argv[1:]])
        tree = {"command": command_line, "machine": machine(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
