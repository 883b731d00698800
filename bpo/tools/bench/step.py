"""A whole training step beside TRL's DPOTrainer: the same pairs, the same weights, the same adapter, in one run.

    bpo bench step                                      # CPU: LLaVA-1.5-7B's proportions, an eighth of its size
    bpo bench step --model llava-1.5-7b                 # a GPU: the whole shape, random weights, bf16
    bpo bench step --model DIR --groups groups.jsonl --image-root IMAGES

Losses, summed log-probs and gradient norms of the first step are compared first; where they differ nothing is reported
and the exit status is 1. Then, a pair: FLOPs, positions through the language model, images through the vision tower,
peak memory, and time in turns (A B A B ...). A step is forward, backward and optimizer on a batch that is ready; images
are decoded before, on either side. The reference is bpo's store, filled before; TRL computes it in every step, as it
keeps none for images. `pip install --constraint constraints.txt 'bpo[bench]'` brings TRL.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
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
from bpo.tools.bench.workers import PROVIDERS, ProviderError, Worker, started
from bpo.tools.bench.world import SHAPES, Lengths, write_groups, write_model
from bpo_kernels.provenance import source_commit

# Tokens of the chosen and rejected answer of a pair, by label.
Tokens = dict[str, tuple[int, int]]
PACKAGES = ("bpo", "torch", "transformers", "deepspeed", "peft", "trl", "liger-kernel", "accelerate")


class DisagreementError(RuntimeError):
    """The providers do not compute the same: their times would compare nothing."""


def options(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; what depends on the machine gets its default here."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="bpo bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    both = "of every provider (default none; with a GPU full: two 7B models share its memory)"
    add("--model", default="llava-1.5-7b-8th", help=f"a directory, or one of {', '.join(SHAPES)} (default: -8th)")
    add("--groups", type=Path, metavar="FILE", help="groups.jsonl to take the step from; default: synthetic groups")
    add("--image-root", type=Path, default=Path("."), metavar="DIR", help="folder of the images of --groups")
    add("--image-tokens", type=int, default=576, help="synthetic groups: of the image (default 576)")
    add("--prompt-tokens", type=int, default=44, help="synthetic groups: of the prompt (default 44)")
    add("--answer-tokens", type=int, default=100, help="synthetic groups: of each answer (default 100)")
    add("--completions", type=int, nargs="+", default=[2, 3], help="synthetic groups: of each; a case each (2 3)")
    add("--num-groups", type=int, default=4 if cuda else 2, help="groups of the step (default 2; with a GPU 4)")
    add("--providers", nargs="+", choices=list(PROVIDERS), default=[OURS, THEIRS])
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    add("--lora-rank", type=int, default=0, help="default: 32, divided as the shape's widths are")
    add("--gradient-checkpointing", choices=("none", "full"), default="full" if cuda else "none", help=both)
    add("--epochs", type=int, default=2, help="over which the store's pass is spread in the amortised figures")
    add("--repetitions", type=int, default=5, help="timed steps of each provider, in turns (default 5)")
    add("--threads", type=int, default=1, help="of each provider on a CPU (default 1)")
    add("--json", type=Path, metavar="FILE", help="writes the report there")
    chosen = parser.parse_args(argv)
    for name in ("num_groups", "epochs", "repetitions", "threads"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(chosen, name)}: give at least 1")
    if OURS not in chosen.providers:
        parser.error(f"--providers: {OURS} must be among them; it is what the others are compared with")
    if chosen.groups is not None and chosen.model in SHAPES:
        parser.error("--groups needs the directory of a real model as --model: a shape knows one image size")
    return chosen


def check_installed(providers: list[str]) -> None:
    """Refuses before the model is built what cannot be imported.

    Raises:
        ValueError: names the missing package and how to install it.
    """
    for provider, package in (*((anchor, "trl") for anchor in ANCHORS), ("trl-liger", "liger-kernel")):
        if provider in providers and _version(package) is None:
            raise ValueError(
                f"--providers {provider} needs {package}: pip install --constraint constraints.txt 'bpo[bench]', "
                f"or leave {provider} out"
            )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures depend on: device, versions, commit."""
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
    """FLOPs and memory of a step, or of the store's pass; the times come later, in turns."""
    return {kind: worker.ask(what, kind) for kind in ("flops", "memory")} | {"time": []}


def why_uncounted(counted: int, useful: int) -> str | None:
    """What a step executes is at least what it needs; less means that the counter has no formula for some operator.

    Returns:
        Why bpo's FLOPs would come out too small and are left out, or None where they are right.
    """
    if counted >= 0.99 * useful:
        return None
    return (
        f"FlopCounterMode counted {counted:.3e} FLOPs in a step of bpo that needs {useful:.3e}: it has no formula for "
        "an operator (those of attention: bpo/model/attention/flops.py); bpo's FLOPs are left out"
    )


def first_steps(workers: dict[str, Worker]) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs the first step of every provider: losses, gradient norms and log-probs; and who refuses, with the reason.

    Raises:
        ProviderError: bpo or TRL itself fails: without them there is nothing to compare.
    """
    first: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for provider, worker in workers.items():
        try:
            worker.wait_until_ready()
            first[provider] = worker.ask("step")  # layers that cannot run on this device fail here
        except ProviderError as error:
            if provider in (OURS, THEIRS):
                raise
            refused[provider] = str(error).splitlines()[0]
    return first, refused


def compare_first_steps(
    first: dict[str, Any], facts: dict[str, dict[str, Any]], case: StepCase, tokens: Tokens
) -> None:
    """Compares what every provider computed in its first step, and its adapter, with bpo's.

    Raises:
        DisagreementError: lists where two providers differ by more than rounding.
    """
    for provider in first:
        if facts[provider]["adapter"] != facts[OURS]["adapter"]:
            raise DisagreementError(f"{OURS} and {provider} have different adapters")
        found = disagreements(first[OURS], first[provider], case.dtype, case.beta, tokens)
        if found:
            raise DisagreementError(f"{OURS} and {provider} do not compute the same:\n  " + "\n  ".join(found))


def _seconds(worker: Worker, what: str) -> dict[str, Any]:
    """One timed run. On a GPU another runs before it, untimed: the device's memory was given back in between."""
    if torch.cuda.is_available():
        worker.ask(what, "time", keep_cache=True)
    return worker.ask(what, "time")


def measure_case(case: StepCase, providers: list[str], repetitions: int, tokens: Tokens) -> dict[str, Any]:
    """First steps compared, then every figure of every provider; providers that refuse are listed with their reason."""
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
    found = {name: figures(one, case.num_pairs) for name, one in measured.items()}
    return {"first_step": first, "facts": facts, "figures": found, "refused": refused, "notes": notes}


def prepare(chosen: argparse.Namespace, completions: int, workdir: Path) -> tuple[StepCase, dict[str, Any]]:
    """The case on disk, and what names it in the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about: dict[str, Any] = {"model": chosen.model, "device": device.type, "device_name": _device_name()}
    about["completions"] = completions
    if chosen.groups is None:
        lengths = Lengths(chosen.image_tokens, chosen.prompt_tokens, chosen.answer_tokens, completions)
        about |= asdict(lengths)
        groups, image_root = write_groups(workdir / "data", lengths, chosen.num_groups), workdir / "data"
    else:
        about |= {"groups": str(chosen.groups), "completions": None}
        groups, image_root = chosen.groups, chosen.image_root
    model = Path(chosen.model)
    if not model.is_dir():
        model = workdir.parent / "model"  # one for all cases
        if not model.is_dir():
            write_model(model, chosen.model, chosen.image_tokens, getattr(torch, chosen.dtype), device)
    case = build_case(
        model,
        groups,
        image_root,
        chosen.num_groups,
        workdir,
        dtype=chosen.dtype,
        lora_rank=chosen.lora_rank or max(1, 32 // SHAPES.get(chosen.model, 1)),
        beta=0.1,
        lr=1e-6,
        gradient_checkpointing=chosen.gradient_checkpointing,
        max_length_tokens=2048,
    )
    names = ("dtype", "lora_rank", "gradient_checkpointing", "beta", "num_tokens", "num_pairs")
    about |= {name: getattr(case, name) for name in names}
    return case, about | {"num_groups": chosen.num_groups, "epochs": chosen.epochs, "threads": chosen.threads}


def answer_tokens(case: StepCase) -> Tokens:
    """Tokens of the chosen and rejected answer of each pair."""
    from bpo.data.processor import load_processor

    tokenizer = load_processor(case.model).tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {row.label: (count(row.chosen), count(row.rejected)) for row in case.rows}


def run_case(chosen: argparse.Namespace, completions: int, workdir: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """One entry of the report, and the verdicts on its targets."""
    case, about = prepare(chosen, completions, workdir)
    result = measure_case(case, chosen.providers, chosen.repetitions, answer_tokens(case))
    found = result["figures"]
    ratio, anchor = None, anchor_of(found)
    if anchor is not None:
        ratio = {"anchor": anchor} | ratios(found[OURS], found[f"{OURS}-reference"], found[anchor], chosen.epochs)
    verdicts = judge(about, ratio)
    result["figures"] = {name: asdict(one) for name, one in found.items()}
    return {"case": about, **result, "ratios": ratio, "targets": [asdict(v) for v in verdicts]}, verdicts


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 measured, whether or not a target is met; 1 the providers disagree.

    Raises:
        ValueError: bad options, data or a missing package; the message says what to do.
    """
    chosen = options(argv)
    check_installed(chosen.providers)
    # Read by PyTorch and by the libraries under it when a provider's process starts.
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    command = f"bpo bench step {shlex.join(sys.argv[1:] if argv is None else argv)}"
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": command.strip(),
        "machine": machine(),
        "cases": [],
    }
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="bpo-bench-") as folder:
        for completions in chosen.completions if chosen.groups is None else [0]:
            try:
                result, judged = run_case(chosen, completions, Path(folder) / f"case-{completions}")
            except (DisagreementError, ProviderError) as error:
                print(f"nothing is reported: {error}", file=sys.stderr)
                return 1
            report["cases"].append(result)
            verdicts += judged
            about = ", ".join(f"{key} {value}" for key, value in result["case"].items() if value is not None)
            print(f"{about}\n\n{table(result)}\n", flush=True)
            if chosen.json:  # after every case: what a deadline cuts short keeps what it has
                chosen.json.parent.mkdir(parents=True, exist_ok=True)
                chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if verdicts:
        print(verdict_table(verdicts))
    return 0
