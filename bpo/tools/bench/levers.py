"""Each optional computation of a model against the plain one, alone and together (`bpo bench step --levers`).

A row is one configuration of the same step, in this process. Its first step must give the values of `plain`: log-probs,
loss and gradient norm to the tolerances of report.py, without LoRA's dropout, whose masks differ between
implementations; else the row is WRONG and the exit status 1. It is then timed with the dropout, in turns with `plain`.
A row that cannot run here says why; one that fails says how, and the next one runs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from bpo import engine
from bpo.config.training import Config, ModelConfig
from bpo.job import collectives
from bpo.job.launch import Ranks, pick_device
from bpo.model.levers.install import choose_levers
from bpo.model.load import resolve_model
from bpo.records import UsefulWork
from bpo.tools.bench import lever_table
from bpo.tools.bench.bpo_provider import OpenStep, open_step
from bpo.tools.bench.report import TOLERANCES
from bpo.tools.bench.step import Tokens, answer_tokens, prepare_case, why_uncounted
from bpo.tools.bench.traffic import Traffic, kernels
from bpo.tools.demo.environment import quiet_libraries
from bpo.training.flops import ModelFlops
from bpo.training.hardware import accelerator_of_device

PLAIN = {
    "model.layer_kernels": "none",
    "model.patch_embedding": "conv",
    "model.compile": "none",
    "model.quantization": "none",
    "lora.kernel": "peft",
    "vision.encode": "micro_batch",
    "vision.cache": "none",
}
_RECOMPUTE = "model.gradient_checkpointing"
AUTO = {name: "auto" for name in ("model.layer_kernels", "model.patch_embedding", "model.compile")}
AUTO |= {"lora.kernel": "auto", "vision.encode": "auto"}
# Exact computations of the same work, which `all` combines.
EXACT = (
    ("model.patch_embedding", "gemm"),
    ("model.layer_kernels", "liger"),
    ("lora.kernel", "addmm"),
    ("lora.kernel", "fused"),
    ("vision.encode", "step"),
    ("model.compile", "layers"),
)


@dataclass(frozen=True)
class Row:
    """A configuration: options over those of `plain`. `approximate`: values may differ, by how much is reported."""

    name: str
    changes: dict[str, str]
    approximate: bool = False


def all_rows(device: torch.device, checkpointing: str, attention: str = "") -> list[Row]:
    """All rows by priority, except `plain`; the options of `all` are filled in when it is reached.

    Args:
        checkpointing, attention: Those of `plain`, which get no row.
    """
    single = [Row(f"{name}={value}", {name: value}) for name, value in EXACT]
    cache = Row("vision.cache=memory", {"vision.encode": "step", "vision.cache": "memory"})
    more = [(_RECOMPUTE, mode) for mode in ("none", "selective", "full", "offload")]
    if device.type == "cuda":
        backends = get_args(get_type_hints(ModelConfig)["attention"])
        more += [("model.attention", name) for name in backends if name not in ("auto", attention)]
    others = [Row(f"{name}={value}", {name: value}) for name, value in more if value != checkpointing]
    quantized = [
        Row(f"model.quantization={name}", {"model.quantization": name}, approximate=True)
        for name in ("nf4", "int8", "fp8")
    ]
    less = [mode for mode in ("selective", "none") if checkpointing not in (mode, "none")]
    everything = [Row("all", {}), *(Row(f"all, recomputing {mode}", {_RECOMPUTE: mode}) for mode in less)]
    return [*single, *everything, Row("auto", AUTO), cache, *others, *quantized]


def selected_rows(names: list[str] | None, rows: list[Row]) -> list[Row]:
    """The rows with these names, in order of priority.

    Raises:
        ValueError: There is no row of a name; lists the names.
    """
    unknown = sorted(set(names or ()) - {"plain", *(row.name for row in rows)})
    if unknown:
        raise ValueError(f"--rows {' '.join(unknown)}: no such row; the rows are {' '.join(row.name for row in rows)}")
    return [row for row in rows if names is None or row.name in names]


def configured(config: Config, changes: dict[str, str], folder: str) -> Config:
    """`config` with the options `section.name` changed, and an output directory of its own."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    sections.setdefault("train", {})["output_dir"] = str(Path(config.train.output_dir) / folder)
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def refusal(config: Config, device: torch.device, row: Row) -> str:
    """Why an option of the row cannot be used for this model and device; empty if all can."""
    try:
        config = configured(config, PLAIN | row.changes, row.name)
        resolved = resolve_model(config.model, device, for_training=True)
        levers = choose_levers(config, resolved)
    except ValueError as error:
        return " ".join(str(error).split())
    for name, lever in levers.items():
        if row.changes.get(name, "auto") not in ("auto", lever.value):
            return f"{name}={row.changes[name]}: {lever.reason}"
    return ""


def combined(config: Config, device: torch.device, results: list[dict[str, Any]]) -> dict[str, str]:
    """The options of `all`: those of `EXACT` that have been measured and are right or, if none has been measured, that
    can be used here. Of two values of an option the faster, or the later one.
    """
    measured = {one["name"]: one for one in results}
    chosen: dict[str, str] = {}
    fastest: dict[str, float] = {}
    for name, value in EXACT:
        if any(f"{option}={choice}" in measured for option, choice in EXACT):
            one = measured.get(f"{name}={value}", {"status": "not selected"})
            is_chosen = one["status"] == "ok" and one["ratio"]["median"] <= fastest.get(name, math.inf)
            if is_chosen:
                fastest[name] = one["ratio"]["median"]
        else:
            is_chosen = not refusal(config, device, Row(name, {name: value}))
        if is_chosen:
            chosen[name] = value
    return chosen


def set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Sets the dropout of every adapter."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and ".lora_dropout." in name:
            module.p = probability


def distances(plain: dict[str, Any], row: dict[str, Any], tokens: Tokens) -> dict[str, float]:
    """Largest differences of two first steps: log-probs in nats per token, loss in nats, gradient norm as a share."""
    gaps = [
        abs(plain["pairs"][label][name] - row["pairs"][label][name]) / count
        for label, counts in tokens.items()
        for side, count in zip(("chosen", "rejected"), counts, strict=True)
        for name in (side, f"reference_{side}")
    ]
    norm = abs(plain["grad_norm"] - row["grad_norm"]) / plain["grad_norm"]
    # max() ignores NaN; a sum does not.
    return {
        "logp": max(gaps) if sum(gaps) < float("inf") else float("nan"),
        "loss": abs(plain["loss"] - row["loss"]),
        "grad_norm": norm,
    }


class Bench:
    """Opens and measures rows of one case, `plain` first.

    On a CPU, whose speed varies, `plain` stays open and the steps take turns; a GPU has one row in memory at a time.

    Args:
        about: Description of the case, from `prepare_case`.
        config: Its training configuration; levers have no values yet.
    """

    def __init__(self, options: argparse.Namespace, about: dict[str, Any], config: Config, tokens: Tokens):
        self.options, self.about, self.config, self.tokens = options, about, config, tokens
        self.ranks, self.device = Ranks(), pick_device(Ranks())
        self.on_gpu = self.device.type == "cuda"
        self.plain: OpenStep | None = None
        self.plain_first: dict[str, Any] = {}
        self.plain_seconds: list[float] = []
        self.work = UsefulWork()
        self.flops: ModelFlops | None = None

    def rows(self) -> list[Row]:
        attention = resolve_model(self.config.model, self.device, for_training=True).attention
        used = attention.backend if attention else ""
        return all_rows(self.device, self.options.gradient_checkpointing, used)

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of a row, or why it has none; `status` is ok, WRONG, not here or failed."""
        result: dict[str, Any] = {"name": row.name, "changes": row.changes, "status": "ok", "reason": ""}
        if reason := refusal(self.config, self.device, row):
            return result | {"status": "not here", "reason": reason}
        opened: list[OpenStep] = []
        begin = time.perf_counter()
        try:
            self._figures(row, opened, result)
        except Exception as error:  # one row's fault must not end the table; the exit status tells of it
            text = " ".join(str(error).split())[:500]
            result |= {"status": "failed", "reason": f"{type(error).__name__}: {text}"}
            result["traceback"] = traceback.format_exc()
        while opened:
            if self.on_gpu or opened[-1] is not self.plain:
                close(opened[-1])
            opened.pop()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        return result | {"row_seconds": time.perf_counter() - begin}

    def _figures(self, row: Row, opened: list[OpenStep], result: dict[str, Any]) -> None:
        """Adds figures to `result`, and to `opened` what must be closed, even after an error."""
        begin = time.perf_counter()
        config = configured(self.config, PLAIN | row.changes, row.name)
        resolved = resolve_model(config.model, self.device, for_training=True)
        before_bytes = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0
        opened.append(step := open_step(config, resolved, self.ranks))
        result["levers"] = {name: lever.value for name, lever in choose_levers(config, resolved).items()}
        set_dropout(step.model, 0.0)
        first = step.results(*step.run(self.about["num_pairs"]))
        if not self.plain_first:
            self.plain = None if self.on_gpu else step
            self.plain_first, self.work, self.flops = first, step.useful_work(), step.flops
        result |= {"loss": first["loss"], "grad_norm": first["grad_norm"]}
        result["distances"] = apart = distances(self.plain_first, first, self.tokens)
        limits = dict(zip(("logp", "loss", "grad_norm"), TOLERANCES[self.about["dtype"]], strict=True))
        if not row.approximate and not all(apart[name] <= limit for name, limit in limits.items()):
            result["status"] = "WRONG"
        set_dropout(step.model, self.options.lora_dropout)
        for _ in range(2 if self.on_gpu else 1):
            step.run(self.about["num_pairs"])
        result["warm_up_seconds"] = time.perf_counter() - begin
        self._times(step, result)
        self._costs(step, result, before_bytes)

    def _seconds(self, step: OpenStep) -> float:
        figures: dict[str, Any] = {}
        gc.collect()
        gc.disable()  # a collection takes as long as many kernels, and would be in some steps only
        try:
            with step.meter.measure("time", figures):
                step.run(self.about["num_pairs"])
        finally:
            gc.enable()
        return float(figures["seconds"])

    def _times(self, step: OpenStep, result: dict[str, Any]) -> None:
        assert self.flops is not None
        own: list[float] = []
        plain: list[float] = []
        for _ in range(self.options.repetitions):
            if self.plain is not None and step is not self.plain:
                plain.append(self._seconds(self.plain))
            own.append(self._seconds(step))
        self.plain_seconds = self.plain_seconds or own
        # Without turns, the repetitions of two rows do not belong together.
        others = plain or ([statistics.median(self.plain_seconds)] * len(own) if self.on_gpu else own)
        ratios = [a / b for a, b in zip(own, others, strict=True)]
        result |= {"seconds": own, "plain_seconds": plain or self.plain_seconds}
        result["ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
        # Each different image goes through the tower once, and not at all if its features are cached.
        images = 0 if step.config.vision.cache != "none" else self.about.get("num_images", self.about["num_groups"])
        names = ("patches", "patch_pairs", "patch_window_pairs")
        shares = {name: getattr(self.work, name) * images // self.about["num_groups"] for name in names}
        result["useful_flops"] = self.flops.step(replace(self.work, **shares))
        if self.on_gpu and self.about["dtype"] == "bfloat16":
            gpu = accelerator_of_device(torch.cuda.get_device_name(self.device))
            result["peak_tflops"] = gpu.peak_tflops if gpu else None

    def _costs(self, step: OpenStep, result: dict[str, Any], before_bytes: int) -> None:
        """FLOPs, peak memory, bytes and launches; after the timed steps, because modes and profilers disturb them."""
        pairs, figures = self.about["num_pairs"], dict[str, Any]()
        with step.meter.measure("memory", figures):
            step.run(pairs)
        result["peak_bytes"] = figures["peak_bytes"]
        if self.on_gpu:  # of this row alone, with its weights
            result["peak_bytes"] += step.meter.weight_bytes - before_bytes
            with kernels(self.device) as launched:
                step.run(pairs)
            result["launches"], result["kernel_seconds"] = launched()
        if result["levers"].get("model.compile") == "layers":
            return  # under a mode, compiled layers would be compiled again or run uncompiled
        with step.meter.measure("flops", figures):
            step.run(pairs)
        if why_uncounted(figures["flops"], result["useful_flops"]) is None:
            result["flops"] = figures["flops"]
        if result["levers"].get("model.layer_kernels") != "liger":  # launched outside PyTorch's dispatcher
            with Traffic() as traffic:
                step.run(pairs)
            result["bytes"] = traffic.bytes
            result.setdefault("launches", traffic.launches)


def close(step: OpenStep) -> None:
    """Frees the memory of a row; DeepSpeed's hooks keep its parameters alive."""
    step.closing.close()
    step.trainer.deepspeed.destroy()
    for parameter in step.model.parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.grad = None
    step.batches.clear()
    torch.compiler.reset()


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Appends all output of this process to a file, including that of C++ libraries."""
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def measure_rows(bench: Bench, rows: list[Row], seconds: float, log: Path) -> Iterator[dict[str, Any]]:
    """Measures `plain` and the rows, each as it is asked for; begins none after `seconds`.

    Raises:
        RuntimeError: `plain` fails, so there is nothing to compare with.
    """
    begin = time.perf_counter()
    results: list[dict[str, Any]] = []
    for row in [Row("plain", {}), *rows]:
        if row.name.startswith("all"):
            row = replace(row, changes=combined(bench.config, bench.device, results) | row.changes)
        if results and time.perf_counter() - begin > seconds:
            result = {"name": row.name, "changes": row.changes, "status": "not run", "reason": "--seconds are over"}
        else:
            with output_to(log):
                result = bench.measure(row)
        if row.name == "plain" and result["status"] != "ok":
            raise RuntimeError(f"the plain step {result['status']}: {result['reason']}")
        results.append(result)
        yield result


def run(options: argparse.Namespace, report: dict[str, Any]) -> int:
    """Prints and writes each row as it is measured; returns 1 if one is wrong or failed, else 0.

    Raises:
        ValueError: Invalid options or data.
    """
    quiet_libraries()
    torch.set_num_threads(options.threads)
    selected_rows(options.rows, all_rows(pick_device(Ranks()), options.gradient_checkpointing))  # before the model
    with tempfile.TemporaryDirectory(prefix="bpo-bench-") as folder:
        log = options.json.with_suffix(".log") if options.json else Path(folder) / "log"
        case, about = prepare_case(options, options.completions[0], Path(folder) / "case")
        about |= {"micro_batches": options.micro_batches, "lora_dropout": options.lora_dropout}
        config = case.config(options.micro_batches, options.lora_dropout)
        report |= {"case": about, "rows": []}
        engine.init_distributed(Ranks())
        gc.collect()
        gc.freeze()  # the libraries' objects: later collections, of which each row needs several, skip them
        try:
            bench = Bench(options, about, config, answer_tokens(case))
            rows = selected_rows(options.rows, bench.rows())
            print(lever_table.head(about), flush=True)
            for result in measure_rows(bench, rows, options.seconds, log):
                report["rows"].append(result)
                print(lever_table.line(result, about), flush=True)
                if options.json:  # after every row, so that an interrupted run keeps the finished ones
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        finally:
            gc.unfreeze()
            collectives.shut_down()
    return int(any(result["status"] in ("WRONG", "failed") for result in report["rows"]))
