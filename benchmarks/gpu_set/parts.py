"""Parts of the GPU set by priority: command, dependencies and time limit of each.

Order: a smoke launch of every kernel, the tests, the measurements for the targets, then other shapes while time
remains. A part that fails blocks only the parts that need it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpo_kernels.bench.cases import TEST_FILES

TARGET_SHAPES = ("llava-1.5-7b", "qwen2.5-vl-7b")
TARGET_ROWS = 2048
GATHER_ROWS = 8192
PAIR_LOSS_ROWS = 1 << 22
OPERATION_TEST_WORKERS = 12
GPU_TEST_WORKERS = 8
# Benchmarks stop this long before their time limit, so that a case in progress can finish.
GRACE_SECONDS = 15.0
INSTALL = "pip install --constraint constraints.txt 'bpo[bench]'"
# Packages that TRL's trainers import.
_TRL = ("trl", "datasets", "pyarrow", "pandas")
_PLAIN = ("bpo", "eager")
_HEAD = ("bpo", "bpo-overlap", "bpo-fused", "eager", "liger", "cce", "trl-chunked")
_FOUR_LAYERS = "llava-1.5-7b-4l"
_FIRST_LEVERS = ("model.layer_kernels=liger", "lora.kernel=addmm", "lora.kernel=fused", "all")
# Runs the operation tests, which are a separate part here.
_REPEATED_TEST = "tests/gpu/test_kernels_gpu.py::test_operation_tests_pass_on_the_gpu"


def why_no_interpreter() -> str | None:
    """The reason why Triton's interpreter cannot run here, or None."""

    def version(package: str) -> tuple[int, ...]:
        return tuple(int(word) for word in importlib.metadata.version(package).split(".")[:2])

    try:
        if version("triton") >= (3, 7) or version("numpy") < (2, 4):
            return None
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"
    return (
        f"the interpreter of triton {importlib.metadata.version('triton')} does not run with numpy "
        f"{importlib.metadata.version('numpy')}: use triton 3.7 or newer, or numpy before 2.4"
    )


@dataclass(frozen=True)
class Setting:
    """Settings of a run: the device, and whether it is a dry run with tiny shapes."""

    device: str
    quick: bool

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Place:
    """Output paths of a part: its report, and a folder that is deleted afterwards; `seconds` is its time limit."""

    report: Path
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Part:
    """One process of the set.

    Attributes:
        estimate_s, limit_s: Estimated duration and time limit on a GPU.
        needs: Parts that must not have failed; `PART:OPERATION` requires only the tests of one operation.
        packages: Imports without which the part is skipped.
        writes: "json" for a report, "lines" for the outcomes of tests.
    """

    name: str
    title: str
    command: Callable[[Setting, Place], list[str]]
    estimate_s: float
    limit_s: float
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    writes: str = "json"
    environment: tuple[tuple[str, str], ...] = ()

    def why_skipped(self) -> str | None:
        """The reason why this machine cannot run the part, or None."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}; {INSTALL}" if missing else None


def _workers(setting: Setting, most: int) -> list[str]:
    count = min(most, setting.cores)
    if count < 2 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(count), "--dist", "worksteal"]


def _pytest(setting: Setting, most_workers: int, *words: str) -> list[str]:
    plain = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_set.recorder", "--tb", "short"]
    plain += ["--continue-on-collection-errors"]  # a file that cannot be imported does not block the others
    return [sys.executable, "-m", "pytest", *plain, *_workers(setting, most_workers), *words]


def _smoke(setting: Setting, place: Place) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_set.smoke", "--device", setting.device, "--json", str(place.report)]


def _operation_tests(setting: Setting, place: Place) -> list[str]:
    files = [f"tests/kernels/{name}" for names in TEST_FILES.values() for name in names]
    return _pytest(setting, OPERATION_TEST_WORKERS, *files)


def _gpu_tests(setting: Setting, place: Place) -> list[str]:
    return _pytest(setting, GPU_TEST_WORKERS, "-m", "gpu", "--deselect", _REPEATED_TEST, "tests/gpu")


def _attention(setting: Setting, place: Place) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.attention", "--device", setting.device, "--json", str(place.report)]
    command += ["--seconds", _inner_seconds(place), "--sample-seconds", "0.3"]
    return command + (["--quick"] if setting.quick else [])


def _memory(setting: Setting, place: Place) -> list[str]:
    command = [sys.executable, "benchmarks/memory_check.py", "--json", str(place.report)]
    return command + (["--only", "llava-lora-zero2"] if setting.quick else [])


def _inner_seconds(place: Place) -> str:
    return f"{max(1.0, place.seconds - GRACE_SECONDS):.1f}"


def _step(completions: int, *providers: str) -> Callable[[Setting, Place], list[str]]:
    """`bpo bench step` with the full LLaVA-1.5-7B; dry runs add plain TRL, because Liger needs a GPU."""

    def command(setting: Setting, place: Place) -> list[str]:
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        others = [name for name in providers if has_liger or name != "trl-liger"] or ["trl"]
        words = ["--completions", str(completions), "--gradient-checkpointing", "full", "--json", str(place.report)]
        if setting.quick:
            lengths = ["--image-tokens", "4", "--prompt-tokens", "24", "--answer-tokens", "8"]
            words += ["--model", "llava-1.5-7b-32nd", *lengths, "--num-groups", "1", "--repetitions", "1"]
            words += ["--providers", *dict.fromkeys(("bpo", "trl", *others))]
        else:
            words += ["--model", "llava-1.5-7b", "--num-groups", "4", "--repetitions", "4"]
            words += ["--providers", "bpo", *others]
        return [sys.executable, "-m", "bpo.cli", "bench", "step", *words]

    return command


def _levers(model: str, *words: str, checkpointing: str = "none") -> Callable[[Setting, Place], list[str]]:
    """`bpo bench step --levers`: two micro-batches of 8,172 packed tokens, LoRA's dropout as in the paper."""

    def command(setting: Setting, place: Place) -> list[str]:
        if setting.quick:
            small = "--model llava-1.5-7b-32nd --image-tokens 4 --prompt-tokens 24 --answer-tokens 8 --num-groups 4"
            rows = "--repetitions 1 --rows model.patch_embedding=gemm lora.kernel=addmm vision.encode=step all auto"
            options = [*small.split(), *rows.split()]
        else:
            options = ["--model", model, "--num-groups", "18", "--answer-tokens", "144", "--repetitions", "3", *words]
            options += ["--gradient-checkpointing", checkpointing, "--seconds", _inner_seconds(place)]
        options = ["--levers", "--completions", "2", *options, "--json", str(place.report)]
        return [sys.executable, "-m", "bpo.cli", "bench", "step", *options]

    return command


def _bench(
    operation: str,
    *options: str,
    shapes: tuple[str, ...] = TARGET_SHAPES,
    rows: tuple[int, ...] = (TARGET_ROWS,),
    quick_rows: tuple[int, ...] = (32,),
    providers: tuple[str, ...] = (),
) -> Callable[[Setting, Place], list[str]]:
    """kernels/bench.py for one operation, whose tests have already run."""

    def command(setting: Setting, place: Place) -> list[str]:
        words = ["--shapes", *(["tiny"] if setting.quick else shapes)]
        words += ["--rows", *map(str, quick_rows if setting.quick else rows)]
        words += ["--providers", *providers] if providers else []
        words += ["--sample-seconds", "0" if setting.quick else "0.2", "--device", setting.device]
        words += ["--seconds", _inner_seconds(place), "--json", str(place.report), "--without-tests"]
        return [sys.executable, "kernels/bench.py", operation, *words, *options]

    return command


_SMOKE = Part("smoke", "smoke launch of every kernel", _smoke, 25, 60)
_INTERPRETER = (("TRITON_INTERPRET", "1"), ("BPO_KERNELS", "triton"))


def _bench_part(
    name: str, title: str, operation: str, estimate_s: float, limit_s: float, options: str = "", **rest: Any
) -> Part:
    packages = ("quack",) if name == "quack" else ()
    command = _bench(operation, *options.split(), **rest)
    return Part(name, title, command, estimate_s, limit_s, (f"operation-tests:{operation}",), packages)


def build_parts(setting: Setting) -> list[Part]:
    """All parts, by priority."""
    environment = (("KERNEL_TEST_DEVICE", setting.device),)
    environment += (("BPO_KERNELS", "triton"),) if setting.device == "cuda" else ()
    tests = Part("operation-tests", "tests of the operations", _operation_tests, 80, 120, writes="lines")
    interpreted = setting.device == "cpu" and why_no_interpreter() is None
    return [
        replace(_SMOKE, environment=_INTERPRETER if interpreted else ()),
        replace(tests, environment=environment),
        Part("gpu-tests", "tests that need a GPU", _gpu_tests, 80, 150, writes="lines"),
        *_target_parts(),
        *_other_parts(),
    ]


def _target_parts() -> list[Part]:
    """Parts that the targets need."""
    loss = "--variants stored-frozen live-frozen --logits peaked"
    return [
        _bench_part("head", "LM head, frozen", "linear_logprob", 60, 85, "--variants frozen", providers=_HEAD),
        _bench_part(
            "head-loss",
            "LM head and loss, frozen",
            "linear_preference_loss",
            35,
            55,
            loss,
            providers=(*_PLAIN, "trl-chunked"),
        ),
        _bench_part("gather", "log-probs from logits", "logprob_gather", 15, 30, rows=(GATHER_ROWS,), providers=_PLAIN),
        _bench_part(
            "pair-loss",
            "preference loss",
            "preference_loss",
            15,
            25,
            rows=(PAIR_LOSS_ROWS, 1 << 13, 128),
            quick_rows=(512, 64),
            providers=_PLAIN,
        ),
        Part("attention", "attention over packed groups", _attention, 50, 80),
        Part(
            "levers", "options of a step, LLaVA's widths", _levers("llava-1.5-7b-4l", "--rows", *_FIRST_LEVERS), 55, 90
        ),
        Part("step", "a training step against TRL's", _step(2, "trl-liger"), 100, 140, packages=_TRL),
    ]


def _other_parts() -> list[Part]:
    """Parts that no target needs, run while time remains."""
    llava, every = TARGET_SHAPES[:1], (*TARGET_SHAPES, "llama-3-8b")
    few = {"providers": (*_HEAD, "torch-chunked"), "quick_rows": (1, 8)}
    plain = {"providers": _PLAIN, "quick_rows": (8,), "shapes": every}
    frozen, peaked = "--variants frozen", "--logits peaked"
    other_variants = f"--variants forward trained {peaked}"
    liger = f"--variants live-frozen {peaked}"
    head, loss, gather = "linear_logprob", "linear_preference_loss", "logprob_gather"
    whole = ("--micro-batches", "1", "--num-groups", "9", "--rows", "auto", "all", "all, recomputing none")
    return [
        Part("memory", "the memory model of bpo plan", _memory, 45, 70),
        Part("levers-more", "all options of a step, LLaVA's widths", _levers(_FOUR_LAYERS), 120, 180),
        Part("levers-qwen", "options of a step, Qwen2.5-VL's widths", _levers("qwen2.5-vl-7b-4l"), 100, 140),
        Part(
            "levers-7b",
            "all options of a step together, LLaVA-1.5-7B",
            _levers("llava-1.5-7b", *whole, checkpointing="full"),
            120,
            160,
        ),
        Part("step-trl", "the step against TRL without Liger", _step(2, "trl"), 90, 140, packages=_TRL),
        _bench_part("head-variants", "LM head, forward and trained", head, 60, 90, other_variants, **few),
        _bench_part("head-llama", "LM head of Llama 3", head, 50, 90, frozen, **few | {"shapes": every[-1:]}),
        _bench_part(
            "head-loss-liger",
            "LM head and loss against Liger's fused DPO",
            loss,
            60,
            90,
            liger,
            shapes=llava,
            quick_rows=(16,),
            providers=(*_PLAIN, "liger-dpo"),
        ),
        _bench_part(
            "gather-rows",
            "log-probs from logits, other rows",
            gather,
            30,
            60,
            peaked,
            rows=(1, 128, TARGET_ROWS),
            **plain,
        ),
        _bench_part(
            "head-rows",
            "LM head, other rows",
            head,
            90,
            150,
            f"{frozen} {peaked}",
            rows=(1, 128, 8192),
            **few | {"shapes": every},
        ),
        _bench_part("head-loss-rows", "LM head and loss, other rows", loss, 60, 120, peaked, rows=(128, 8192), **plain),
        Part("step-3", "the step with groups of three", _step(3, "trl-liger"), 110, 160, packages=_TRL),
        _bench_part("quack", "LM head against QuACK", head, 90, 170, frozen, providers=("bpo", "quack")),
    ]
