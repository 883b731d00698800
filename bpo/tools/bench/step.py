"""A complete training step compared with TRL's DPOTrainer on the same pairs, weights and adapter.

    bpo bench step                                      # CPU: LLaVA-1.5-7B scaled down by 8
    bpo bench step --model llava-1.5-7b                 # GPU: full shape, random weights, bf16
    bpo bench step --model DIR --groups groups.jsonl --image-root IMAGES
    bpo bench step --levers                             # each optional computation against the plain one: levers.py

Compares losses, summed log-probs and gradient norms of the first step; if they differ, nothing is reported and the exit
status is 1. Then measures per pair: FLOPs, positions through the language model, images through the vision tower,
peak memory, and time in turns (A B A B ...). A step is forward, backward and optimizer on a prepared batch; both sides
decode images beforehand. bpo reads reference log-probs from its store, filled beforehand; TRL computes them in every
step, as it cannot precompute them for images. Install TRL: pip install --constraint constraints.txt 'bpo[bench]'
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bpo.tools.bench.case import StepCase, build_case
from bpo.tools.bench.report import (
    ANCHORS,
    OURS,
    THEIRS,
    Verdict,
    anchor_of,
    disagreements,
    figures,
    judge,
    ratios,
    table,
    verdict_table,
)
from bpo.tools.bench.synthetic import SHAPES, Lengths, Shape, write_groups, write_model
from bpo.tools.bench.workers import PROVIDERS, ProviderError, Worker, started
from bpo_kernels.provenance import source_commit

# Tokens of the chosen and rejected answer of a pair, by label.
Tokens = dict[str, tuple[int, int]]
PACKAGES = ("bpo", "torch", "transformers", "deepspeed", "peft", "trl", "liger-kernel", "accelerate")


class DisagreementError(RuntimeError):
    """The providers compute different results, so their times are not comparable."""


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; sets the defaults that depend on the machine."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="bpo bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    both = "for all providers (default none; full on GPU, where two 7B models share the memory)"
    add("--model", default="llava-1.5-7b-8th", help=f"a directory, or one of {', '.join(SHAPES)} (default: -8th)")
    add("--groups", type=Path, metavar="FILE", help="groups.jsonl with the groups of the step; default: synthetic")
    add("--image-root", type=Path, default=Path("."), metavar="DIR", help="folder of the images of --groups")
    add("--image-tokens", type=int, default=576, help="synthetic groups: tokens per image (default 576)")
    add("--prompt-tokens", type=int, default=44, help="synthetic groups: tokens per prompt (default 44)")
    add("--answer-tokens", type=int, default=100, help="synthetic groups: tokens per answer (default 100)")
    add("--completions", type=int, nargs="+", default=[2, 3], help="synthetic groups: one case per number (2 3)")
    add("--num-groups", type=int, default=4 if cuda else 2, help="groups per step (default 2; 4 on GPU)")
    add("--providers", nargs="+", choices=list(PROVIDERS), default=[OURS, THEIRS])
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    add("--lora-rank", type=int, default=0, help="default: 32, scaled down with the shape")
    add("--gradient-checkpointing", choices=("none", "full"), default="full" if cuda else "none", help=both)
    add("--epochs", type=int, default=2, help="epochs that share the reference pass in the amortised figures")
    add("--repetitions", type=int, default=5, help="timed steps per provider, in turns (default 5)")
    add("--threads", type=int, default=1, help="CPU threads per provider (default 1)")
    add("--json", type=Path, metavar="FILE", help="write the report to FILE")
    levers = parser.add_argument_group(
        "table of options, each alone and all together, instead of providers"
    ).add_argument
    levers("--levers", action="store_true", help="their table, instead of providers; for the first of --completions")
    levers("--rows", nargs="+", metavar="ROW", help="only these rows, such as lora.kernel=fused, all or auto")
    levers("--micro-batches", type=int, default=2, help="micro-batches of the step (default 2)")
    levers("--shared-images", type=int, help="groups with the image of another (default: a quarter of the groups)")
    levers("--lora-dropout", type=float, default=0.05, help="while timed (default 0.05); values are compared without")
    levers("--seconds", type=float, default=math.inf, help="begin no row after this time (default: no limit)")
    options = parser.parse_args(argv)
    for name in ("num_groups", "epochs", "repetitions", "threads", "micro_batches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    if OURS not in options.providers:
        parser.error(f"--providers must include {OURS}, the baseline of the comparison")
    if not 0 <= options.lora_dropout < 1:
        parser.error(f"--lora-dropout {options.lora_dropout:g}: give at least 0 and less than 1")
    if options.shared_images is None:
        options.shared_images = options.num_groups // 4 if options.levers else 0
    if not 0 <= options.shared_images < options.num_groups:
        parser.error(f"--shared-images {options.shared_images}: give at least 0 and less than --num-groups")
    if options.groups is not None and options.model in SHAPES:
        parser.error("--groups needs a model directory as --model: the built-in shapes have a fixed image size")
    return options


def check_installed(providers: list[str]) -> None:
    """Checks that the packages of the providers are installed, before the model is created.

    Raises:
        ValueError: A package is missing; the message says how to install it.
    """
    for provider, package in (*((anchor, "trl") for anchor in ANCHORS), ("trl-liger", "liger-kernel")):
        if provider in providers and _version(package) is None:
            raise ValueError(
                f"--providers {provider} needs {package}: pip install --constraint constraints.txt 'bpo[bench]', "
                f"or omit {provider}"
            )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Device, versions and commit for the report."""
    return {
        "device": _device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": source_commit("bpo", "kernels"),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure_provider(worker: Worker, what: str) -> dict[str, Any]:
    """FLOPs and memory of a step or of the reference pass; times are added later, in turns."""
    return {kind: worker.ask(what, kind) for kind in ("flops", "memory")} | {"time": []}


def why_uncounted(counted: int, useful: int) -> str | None:
    """Why bpo's counted FLOPs are too small to report: an operator without formula; None if they are plausible.

    A step executes at least its useful FLOPs, so a smaller count means that the counter missed an operator.
    """
    if counted >= 0.99 * useful:
        return None
    return (
        f"FlopCounterMode counted {counted:.3e} FLOPs in a bpo step that needs {useful:.3e}: it has no formula for an "
        "operator (attention: bpo/model/attention/flops.py); bpo's FLOPs are not reported"
    )


def first_steps(workers: dict[str, Worker]) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs the first step of every provider; returns its results (loss, gradient norm, log-probs) and failure reasons.

    Raises:
        ProviderError: bpo or plain TRL fails, so there is nothing to compare.
    """
    first: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for provider, worker in workers.items():
        try:
            worker.wait_until_ready()
            first[provider] = worker.ask("step")  # fails here if a layer does not support the device
        except ProviderError as error:
            if provider in (OURS, THEIRS):
                raise
            refused[provider] = str(error).splitlines()[0]
    return first, refused


def compare_first_steps(
    first: dict[str, Any], facts: dict[str, dict[str, Any]], case: StepCase, tokens: Tokens
) -> None:
    """Compares the adapter and the first step of every provider with bpo's.

    Raises:
        DisagreementError: Two providers differ by more than rounding; the message lists the differences.
    """
    for provider in first:
        if facts[provider]["adapter"] != facts[OURS]["adapter"]:
            raise DisagreementError(f"{OURS} and {provider} have different adapters")
        found = disagreements(first[OURS], first[provider], case.dtype, case.beta, tokens)
        if found:
            raise DisagreementError(f"{OURS} and {provider} compute different results:\n  " + "\n  ".join(found))


def _seconds(worker: Worker, what: str) -> dict[str, Any]:
    """One timed run; on GPU after an untimed one, because the cached memory was released in between."""
    if torch.cuda.is_available():
        worker.ask(what, "time", keep_cache=True)
    return worker.ask(what, "time")


def measure_case(case: StepCase, providers: list[str], repetitions: int, tokens: Tokens) -> dict[str, Any]:
    """Compares the first steps, then measures every provider; lists providers that fail with the reason."""
    notes: list[str] = []
    with started(providers, case) as workers:
        first, refused = first_steps(workers)
        running = {provider: workers[provider] for provider in first}
        compare_first_steps(first, {provider: worker.facts for provider, worker in running.items()}, case, tokens)
        measured = {provider: measure_provider(worker, "step") for provider, worker in running.items()}
        measured[f"{OURS}-reference"] = measure_provider(running[OURS], "reference")
        why = why_uncounted(measured[OURS]["flops"]["flops"], running[OURS].facts["useful_flops"])
        if why is not None:
            notes.append(why)
            for name in (OURS, f"{OURS}-reference"):
                measured[name]["flops"]["flops"] = None
        for _ in range(repetitions):
            for provider, worker in running.items():
                measured[provider]["time"].append(_seconds(worker, "step"))
            measured[f"{OURS}-reference"]["time"].append(_seconds(running[OURS], "reference"))
        facts = running[OURS].facts
    by_provider = {name: figures(costs, case.num_pairs) for name, costs in measured.items()}
    return {"first_step": first, "facts": facts, "figures": by_provider, "refused": refused, "notes": notes}


def prepare_case(options: argparse.Namespace, completions: int, workdir: Path) -> tuple[StepCase, dict[str, Any]]:
    """Writes the case to disk; returns it with its description for the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about: dict[str, Any] = {"model": options.model, "device": device.type, "device_name": _device_name()}
    about["completions"] = completions
    if options.groups is None:
        lengths = Lengths(options.image_tokens, options.prompt_tokens, options.answer_tokens, completions)
        about |= asdict(lengths) | {"num_images": options.num_groups - options.shared_images}
        sizes = (options.num_groups, about["num_images"], SHAPES.get(options.model, Shape()).pixels_per_token)
        groups, image_root = write_groups(workdir / "data", lengths, *sizes), workdir / "data"
    else:
        about |= {"groups": str(options.groups), "completions": None}
        groups, image_root = options.groups, options.image_root
    model = Path(options.model)
    if not model.is_dir():
        model = workdir.parent / "model"  # shared by all cases
        if not model.is_dir():
            write_model(model, options.model, options.image_tokens, getattr(torch, options.dtype), device)
    case = build_case(
        model,
        groups,
        image_root,
        options.num_groups,
        workdir,
        dtype=options.dtype,
        lora_rank=options.lora_rank or max(1, 32 // SHAPES.get(options.model, Shape()).divisor),
        beta=0.1,
        lr=1e-6,
        gradient_checkpointing=options.gradient_checkpointing,
        max_length_tokens=2048,
    )
    names = ("dtype", "lora_rank", "gradient_checkpointing", "beta", "num_tokens", "num_pairs")
    about |= {name: getattr(case, name) for name in names}
    return case, about | {"num_groups": options.num_groups, "epochs": options.epochs, "threads": options.threads}


def answer_tokens(case: StepCase) -> Tokens:
    """Number of tokens of the chosen and rejected answer of each pair."""
    from bpo.data.processor import load_processor

    tokenizer = load_processor(case.model).tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {row.label: (count(row.chosen), count(row.rejected)) for row in case.rows}


def run_case(options: argparse.Namespace, completions: int, workdir: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Measures one case; returns its entry in the report and the verdicts on its targets."""
    case, about = prepare_case(options, completions, workdir)
    result = measure_case(case, options.providers, options.repetitions, answer_tokens(case))
    found = result["figures"]
    ratio, anchor = None, anchor_of(found)
    if anchor is not None:
        ratio = {"anchor": anchor} | ratios(found[OURS], found[f"{OURS}-reference"], found[anchor], options.epochs)
    verdicts = judge(about, ratio)
    result["figures"] = {name: asdict(costs) for name, costs in found.items()}
    return {"case": about, **result, "ratios": ratio, "targets": [asdict(v) for v in verdicts]}, verdicts


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 if measured, even if a target is missed; 1 if the providers disagree.

    Raises:
        ValueError: Invalid options or data, or a missing package.
    """
    options = parse_options(argv)
    if not options.levers:
        check_installed(options.providers)
    # Read by PyTorch and OpenMP when a provider's process starts.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    command = f"bpo bench step {shlex.join(sys.argv[1:] if argv is None else argv)}"
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": command.strip(),
        "machine": machine(),
        "cases": [],
    }
    if options.levers:
        from bpo.tools.bench import levers

        return levers.run(options, report)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="bpo-bench-") as folder:
        for completions in options.completions if options.groups is None else [0]:
            try:
                result, judged = run_case(options, completions, Path(folder) / f"case-{completions}")
            except (DisagreementError, ProviderError) as error:
                print(f"nothing is reported: {error}", file=sys.stderr)
                return 1
            report["cases"].append(result)
            verdicts += judged
            about = ", ".join(f"{key} {value}" for key, value in result["case"].items() if value is not None)
            print(f"{about}\n\n{table(result)}\n", flush=True)
            if options.json:  # after every case, so that an interrupted run keeps the finished cases
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if verdicts:
        print(verdict_table(verdicts))
    return 0
