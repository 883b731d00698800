"""Times the operations against PyTorch eager, forward and backward, after their tests have passed.

    python kernels/bench.py [linear_logprob logprob_gather preference_loss]
        [--shapes llava-1.5-7b qwen2.5-vl-7b llama-3-8b smollm] [--rows 2048] [--dtype bf16] [--json FILE]

Runs from a clone, on CUDA (Triton) or on a CPU (the plain PyTorch path; times are then CPU times and say nothing of a
GPU). Where an operation's tests fail nothing is reported and the exit status is 1. Rates are computed from the FLOPs
and bytes that the operation *needs* (`needed_work`), the same for every provider, so a provider that does more has a
lower rate.

Legend: N rows (response tokens), H hidden size, V vocabulary, P pairs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bpo_kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ("linear_logprob", "logprob_gather", "preference_loss")
# Hidden size and vocabulary of the LM heads.
SHAPES = {
    "llava-1.5-7b": (4096, 32064),
    "qwen2.5-vl-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "smollm": (576, 49152),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Tokens of one completion, for the number of pairs that N tokens make.
TOKENS_PER_COMPLETION = 128
MIN_SAMPLES, MIN_SECONDS = 5, 1.0

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One benchmark: the same forward and backward by each provider."""

    operation: str
    variant: str
    shape: str
    num_rows: int
    flops: int
    needed_bytes: int
    providers: dict[str, Step]


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    operation: str
    variant: str
    shape: str
    num_rows: int
    provider: str
    median_ms: float
    tflop_per_s: float | None
    gb_per_s: float | None
    peak_bytes: int


def needed_work(
    operation: str, num_rows: int, hidden_size: int, vocab: int, itemsize: int, trained: bool
) -> tuple[int, int]:
    """FLOPs and bytes that forward and backward need at least: inputs read once per pass, outputs written once.

    linear_logprob   2NVH each for logits, hidden gradient and (trained head) weight gradient
    logprob_gather   one read of the logits forward, one read and one write backward
    preference_loss  policy, reference and completion of each token forward; completion and gradient backward
    """
    if operation == "linear_logprob":
        weight_bytes, hidden_bytes = vocab * hidden_size * itemsize, num_rows * hidden_size * itemsize
        gemms = 3 if trained else 2
        return gemms * 2 * num_rows * vocab * hidden_size, gemms * (weight_bytes + hidden_bytes)
    if operation == "logprob_gather":
        return 0, 3 * num_rows * vocab * itemsize
    num_pairs = num_rows // (2 * TOKENS_PER_COMPLETION)
    return 0, num_rows * (4 + 4 + 8 + 8 + 4) + num_pairs * (16 + 4 * 4 + 16 + 8)


def _forward_backward(operation: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    output = operation(*inputs)
    torch.autograd.grad(output, wanted, torch.ones_like(output))


def _eager_logprob(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return torch.log_softmax(logits_NV.float(), dim=-1).gather(1, target_N[:, None])[:, 0]


def _eager_linear(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    return _eager_logprob(F.linear(hidden_NH, weight_VH), target_N)


def _eager_preference(
    policy_N: Tensor, reference_N: Tensor, completion_N: Tensor, pairs_P2: Tensor, beta: float
) -> Tensor:
    ratio_K = policy_N.new_zeros(int(pairs_P2.max()) + 1).index_add(0, completion_N, policy_N - reference_N)
    return -F.logsigmoid(beta * (ratio_K[pairs_P2[:, 0]] - ratio_K[pairs_P2[:, 1]]))


def _head_cases(operation: str, shape: str, num_rows: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """linear_logprob with a frozen and a trained head, or logprob_gather on logits of the same size."""
    hidden_size, vocab = SHAPES[shape]
    target_N = torch.randint(vocab, (num_rows,), device=device)
    if operation == "logprob_gather":
        logits_NV = torch.randn(num_rows, vocab, device=device, dtype=dtype).requires_grad_()
        steps = {
            "bpo": functools.partial(dispatch.logprob_gather, target_N=target_N),
            "eager": functools.partial(_eager_logprob, target_N=target_N),
        }
        variants = [("", [logits_NV], False)]
    else:
        hidden_NH = torch.randn(num_rows, hidden_size, device=device, dtype=dtype).requires_grad_()
        weight_VH = torch.randn(vocab, hidden_size, device=device, dtype=dtype).mul_(hidden_size**-0.5)
        trained_VH = weight_VH.detach().requires_grad_()
        steps = {
            "bpo": functools.partial(dispatch.linear_logprob, target_N=target_N),
            "eager": functools.partial(_eager_linear, target_N=target_N),
        }
        variants = [("frozen", [hidden_NH, weight_VH], False), ("trained", [hidden_NH, trained_VH], True)]
    return [
        Case(
            operation,
            variant,
            shape,
            num_rows,
            *needed_work(operation, num_rows, hidden_size, vocab, dtype.itemsize, trained),
            {name: functools.partial(_forward_backward, step, inputs) for name, step in steps.items()},
        )
        for variant, inputs, trained in variants
    ]


def _preference_case(num_rows: int, device: torch.device) -> Case:
    policy_N = torch.randn(num_rows, device=device).requires_grad_()
    reference_N = torch.randn(num_rows, device=device)
    completion_N = torch.arange(num_rows, device=device) // TOKENS_PER_COMPLETION
    num_completions = -(-num_rows // TOKENS_PER_COMPLETION)
    pairs_P2 = torch.arange(num_completions // 2 * 2, device=device).view(-1, 2)
    if pairs_P2.shape[0] == 0:
        raise ValueError(f"--rows {num_rows} gives no pair: use at least {2 * TOKENS_PER_COMPLETION}")

    def ours(policy_N: Tensor) -> Tensor:
        return dispatch.preference_loss(
            policy_N, reference_N, completion_N, pairs_P2, 0.1, num_completions=num_completions
        )[0]

    def eager(policy_N: Tensor) -> Tensor:
        return _eager_preference(policy_N, reference_N, completion_N, pairs_P2, 0.1)

    work = needed_work("preference_loss", num_rows, 0, 0, 4, trained=False)
    steps = {
        name: functools.partial(_forward_backward, step, [policy_N]) for name, step in (("bpo", ours), ("eager", eager))
    }
    return Case("preference_loss", "", "", num_rows, *work, steps)


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """Largest memory in use during `step` above what was in use before, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # Allocations in order of time; the profiler's own tables only sum them per operation.
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        in_use += record.nbytes()
        peak = max(peak, in_use)
    return peak


def _sample_ms(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def measure(case: Case, device: torch.device) -> list[Result]:
    """Medians of interleaved samples: a slow spell of the machine then strikes every provider alike."""
    samples_ms: dict[str, list[float]] = {name: [] for name in case.providers}
    for step in case.providers.values():
        step()
    deadline = time.monotonic() + MIN_SECONDS * len(case.providers)
    while time.monotonic() < deadline or len(next(iter(samples_ms.values()))) < MIN_SAMPLES:
        for name, step in case.providers.items():
            samples_ms[name].append(_sample_ms(step, device))
    results = []
    for name, step in case.providers.items():
        median_ms = statistics.median(samples_ms[name])
        rates = (case.flops / median_ms / 1e9, None) if case.flops else (None, case.needed_bytes / median_ms / 1e6)
        labels = (case.operation, case.variant, case.shape, case.num_rows, name)
        results.append(Result(*labels, median_ms, *rates, peak_extra_bytes(step, device)))
    return results


def tests_pass(operation: str, device: torch.device) -> bool:
    """Runs tests/kernels/test_OPERATION.py on `device` and prints its output where it fails."""
    path = ROOT / "tests" / "kernels" / f"test_{operation}.py"
    if not path.exists():
        print(f"{path} is missing: run the benchmark from a clone of the repository", file=sys.stderr)
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    environment = os.environ | {"KERNEL_TEST_DEVICE": device.type}
    if device.type == "cuda":
        environment["BPO_KERNELS"] = dispatch.chosen_implementation(torch.empty(0, device=device))
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if outcome.returncode:
        print(outcome.stdout[-4000:], outcome.stderr[-2000:], file=sys.stderr)
    return outcome.returncode == 0


def machine(device: torch.device) -> dict[str, str | int]:
    """What a figure depends on: device, versions, commit."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "kernels"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "implementation": dispatch.chosen_implementation(torch.empty(0, device=device)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "commit": git.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"default: {' '.join(OPERATIONS)}")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: smollm on a CPU, else LLaVA and Qwen")
    parser.add_argument("--rows", nargs="+", type=int, help="response tokens; default: 256 on a CPU, else 2048")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    for operation in options.operations:
        if operation not in OPERATIONS:
            parser.error(f"unknown operation {operation!r}: use {', '.join(OPERATIONS)}")
    operations = options.operations or list(OPERATIONS)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    dtype = DTYPES[options.dtype or ("bf16" if on_cuda else "fp32")]
    about = machine(device)
    for operation in operations:
        print(f"tests of {operation} ...", flush=True)
        if not tests_pass(operation, device):
            print(f"the tests of {operation} fail: nothing is reported", file=sys.stderr)
            return 1
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print("forward + backward" if on_cuda else "forward + backward, CPU times: they say nothing of a GPU")
    print("| operation | shape | rows | provider | ms | rate | peak MiB |\n|---|---|---|---|---|---|---|")
    results: list[Result] = []
    for operation in operations:
        for num_rows in options.rows or [2048 if on_cuda else 256]:
            shapes = options.shapes or (["llava-1.5-7b", "qwen2.5-vl-7b"] if on_cuda else ["smollm"])
            for shape in [""] if operation == "preference_loss" else shapes:
                cases = _head_cases(operation, shape, num_rows, dtype, device) if shape else []
                for case in cases or [_preference_case(num_rows, device)]:
                    results += measure(case, device)
                    _print_rows(results[-len(case.providers) :])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = about | {"dtype": str(dtype), "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _print_rows(results: list[Result]) -> None:
    for result in results:
        rate = f"{result.tflop_per_s:.3f} TFLOP/s" if result.tflop_per_s is not None else f"{result.gb_per_s:.2f} GB/s"
        label = f"{result.operation} {result.variant}".strip()
        print(
            f"| {label} | {result.shape} | {result.num_rows} | {result.provider} "
            f"| {result.median_ms:.3f} | {rate} | {result.peak_bytes / 2**20:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
