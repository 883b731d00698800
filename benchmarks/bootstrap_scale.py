"""What a bootstrapping job of many annotations costs beside its generation: to read, plan, look up, and merge.

    python -m benchmarks.bootstrap_scale [--records 1000 1000000] [--json benchmarks/results/bootstrap-scale-cpu.json]

A LLaVA JSON list of descriptions of about 60 words, and one finished negative a record in the part of a rank. Each
number of records has a process of its own; resident memory is that process's most, beside what its imports took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bpo.bootstrap.merge import merge
from bpo.bootstrap.parts import Outcome, PartReader, PartWriter
from bpo.bootstrap.run import plan_work
from bpo.bootstrap.spool import AnnotationSpool
from bpo.config import Config, DataConfig
from bpo.config_bootstrap import BootstrapConfig
from bpo.data.bad_records import BadRecords
from bpo.data.formats import iterate_annotations
from bpo.records import Provenance
from bpo_kernels.bench_measure import machine

TEXT = "A man in a blue jacket rides a bicycle along a street with two parked cars and a red bus behind them. " * 3


def write_data(folder: Path, count: int) -> None:
    with (folder / "annotations.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"{number}: {TEXT}"}]
            record = {"id": f"r{number:09}", "image": f"{number}.jpg", "conversations": turns}
            file.write(("," if number else "") + json.dumps(record))
        file.write("]")
    provenance = Provenance("injected-errors", model="m", seed=1)
    with PartWriter(folder / "groups.jsonl.parts", 0) as writer:
        for first in range(0, count, 1000):
            numbers = range(first, min(count, first + 1000))
            texts = ((f"r{n:09}", f"{n}: {TEXT} A zebra.") for n in numbers)
            writer.append(Outcome(name, "inject", "kept", text, provenance=provenance) for name, text in texts)


def rss_mib() -> float:
    """Most resident memory of this process so far; not `getrusage`, which tells of the process it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(folder: Path, count: int) -> dict[str, Any]:
    data = DataConfig(annotations=str(folder / "annotations.json"), groups=str(folder / "groups.jsonl"))
    config = Config(data=data, bootstrap=BootstrapConfig(sources=["inject"]))
    figures: dict[str, Any] = {"records": count, "imports_mib": rss_mib()}
    at = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal at
        figures[f"{name}_s"], at = time.perf_counter() - at, time.perf_counter()

    bad = BadRecords.of(data)
    annotations = AnnotationSpool(iterate_annotations(Path(data.annotations), bad), 0, data.max_completion_words)
    lap("read")
    work = plan_work(annotations, config)["inject"]
    lap("plan")
    reader = PartReader(folder / "groups.jsonl.parts")
    reader.poll()
    lap("index")
    assert all(reader.has("inject", one) for one in work.all_digests())
    lap("look_up")
    summary = merge(config, annotations, reader, {}, {}, bad)
    lap("merge")
    assert summary.num_groups == count
    return figures | {"peak_mib": rss_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.records[0])))
        return
    rows = []
    for count in options.records:
        with tempfile.TemporaryDirectory() as temporary:
            write_data(Path(temporary), count)
            command = [sys.executable, "-m", "benchmarks.bootstrap_scale", "--measure", temporary]
            done = subprocess.run([*command, "--records", str(count)], stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout)
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
