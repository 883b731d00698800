"""Benchmark measurements: agreement first, then interleaved times, peak memory, FLOPs, rooflines, traces.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import dispatch
from ..provenance import source_commit
from .cases import Case, make_inputs, needed_work, true_result
from .providers import DISTRIBUTIONS, OURS, PROVIDERS, Step, Unavailable, version_of

ROOT = Path(__file__).resolve().parents[2]
MIN_SAMPLES = 5
# Agreement with fp32: (largest error of a value in nats, relative error of a gradient in the Frobenius norm). Logits
# that a provider rounds to bf16 are off by up to 0.03 nat for a peaked target.
TOLERANCES = {torch.float32: (1e-3, 1e-3), torch.float16: (2e-2, 1e-2), torch.bfloat16: (1e-1, 5e-2)}
# Written before each sample, so that no provider finds the inputs in the L2 cache (50 MiB on an H100).
_FLUSH_BYTES = 256 << 20
# Idle loop on the device while the host queues the whole step, so that device time is measured. It lasts 1.5 times as
# long as the host needs, within these bounds: the host time of a step that synchronises cannot be hidden.
_SLEEP_MARGIN, _LEAST_SLEEP_MS, _MOST_SLEEP_MS = 1.5, 0.5, 20.0
_CALIBRATION_CYCLES = 20_000_000


@dataclass(frozen=True)
class Result:
    """One line of the table; without times, `status` is not ok and `note` gives the reason."""

    operation: str
    variant: str
    shape: str
    num_rows: int
    logits: str
    provider: str
    status: str  # ok, skipped, disagrees, failed
    note: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tflop_per_s: float | None = None
    gemm_share: float | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    peak_bytes: int | None = None
    counted_flops: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None


def machine(device: torch.device) -> dict[str, str | int]:
    """Environment of the measurements: device, versions, commit."""

    versions = {DISTRIBUTIONS[name]: version_of(name) or "not installed" for name in DISTRIBUTIONS}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "implementation": dispatch.chosen_implementation(torch.empty(0, device=device)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "commit": source_commit("kernels"),
        **versions,
    }


def disagreement(case: Case, got: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """(error of the values in nats, largest relative error of a gradient); infinite if a result is not finite.

    A provider that returns one number is compared with the sum over tokens or the mean over pairs; its error is per
    token.
    """
    values, expected = got[0].float(), truth[0]
    if values.dim() == 0:
        total = expected.mean() if case.has_pairs else expected.sum()
        value_error = abs(float(values - total)) / (1 if case.has_pairs else case.num_rows)
    else:
        value_error = float((values - expected).abs().max())
    gradient_error = 0.0
    for grad, true_grad in zip(got[1:], truth[1:], strict=True):
        gradient_error = max(gradient_error, float((grad.float() - true_grad).norm() / true_grad.norm()))
    infinite = float("inf")
    return (value_error if value_error == value_error else infinite), (
        gradient_error if gradient_error == gradient_error else infinite
    )


def peak_extra_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak memory during `step` in addition to the memory in use before, in bytes."""
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


def counted_flops(step: Callable[[], object]) -> int:
    """FLOPs of the GEMMs that `step` calls through PyTorch; those in Triton kernels are not counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


@functools.cache
def _cycles_per_ms(device: torch.device) -> float:
    """Cycles of `torch.cuda._sleep` that take one millisecond."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # the clock rate rises under load
    start.record()
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    end.record()
    torch.cuda.synchronize()
    return _CALIBRATION_CYCLES / start.elapsed_time(end)


def sleep_ms(queue_ms: float) -> float:
    """Idle time of the device before a step that the host queues in `queue_ms`."""
    return min(_MOST_SLEEP_MS, max(_LEAST_SLEEP_MS, _SLEEP_MARGIN * queue_ms))


def sleep_cycles(step: Callable[[], object], device: torch.device) -> int:
    """Idle cycles of the device while the host queues `step`, which has run before; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    queue_ms = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        queue_ms.append((time.perf_counter() - begin) * 1e3)
    torch.cuda.synchronize()
    return int(sleep_ms(statistics.median(queue_ms)) * _cycles_per_ms(device))


def sample_ms(step: Callable[[], object], device: torch.device, idle_cycles: int) -> float:
    """Time of one run: device time with a cold L2 cache on CUDA, after `idle_cycles`; wall time on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush_buffer(device).zero_()
        torch.cuda._sleep(idle_cycles)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def interleaved_ms(steps: dict[str, Step], device: torch.device, sample_seconds: float) -> dict[str, list[float]]:
    """Samples all steps in turn, so that slow phases of the machine affect all providers alike."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    cycles = {}
    for name, step in steps.items():
        step()
        cycles[name] = sleep_cycles(step, device)
    deadline = time.monotonic() + sample_seconds * len(steps)
    while steps and (time.monotonic() < deadline or len(next(iter(samples.values()))) < MIN_SAMPLES):
        for name, step in steps.items():
            samples[name].append(sample_ms(step, device, cycles[name]))
    return samples


def _median_ms(step: Callable[[], object], device: torch.device) -> float:
    step()
    cycles = sleep_cycles(step, device)
    samples = [sample_ms(step, device, cycles)]
    # On some CPUs a half-precision GEMM takes many seconds.
    while len(samples) < 2 * MIN_SAMPLES and sum(samples) < 1e3:
        samples.append(sample_ms(step, device, cycles))
    return statistics.median(samples)


@functools.cache
def gemm_roofline(num_rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of the fastest of the operation's three GEMMs with plain `torch.mm`: logits, dX and dW."""
    hidden_NH = torch.randn(num_rows, hidden_size, device=device, dtype=dtype)
    weight_VH = torch.randn(vocab, hidden_size, device=device, dtype=dtype)
    dlogits_NV = torch.randn(num_rows, vocab, device=device, dtype=dtype)
    factors = ((hidden_NH, weight_VH.t()), (dlogits_NV, weight_VH), (dlogits_NV.t(), hidden_NH))
    fastest_ms = min(_median_ms(functools.partial(torch.mm, *pair), device) for pair in factors)
    return 2 * num_rows * hidden_size * vocab / fastest_ms / 1e9


@functools.cache
def copy_gb_per_s(num_bytes: int, device: torch.device) -> float:
    """GB/s, reading and writing, of a plain copy that moves `num_bytes` in total, as many as the case needs to move.

    A small copy is launch-bound like a small kernel, so the share of its rate shows the possible gain.
    """
    source = torch.zeros(max(1, num_bytes // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_ms(lambda: target.copy_(source), device) / 1e6


def measure(
    case: Case, providers: list[str], profile_dir: Path | None = None, sample_seconds: float = 1.0
) -> list[Result]:
    """Measures all providers of a case: those that agree with fp32 are timed, the others get a line with the reason.

    Each provider is run for `sample_seconds`, and at least 5 times.

    Exceptions of bpo's own implementations propagate; those of a library are reported in its line.
    """
    inputs = make_inputs(case)
    truth = true_result(case, inputs)
    steps: dict[str, Step] = {}
    errors: dict[str, tuple[float, float]] = {}
    lines: dict[str, Result] = {}
    build = PROVIDERS[case.operation]
    labels = (case.operation, case.variant, case.shape if case.operation != "preference_loss" else "", case.num_rows)
    for name in (name for name in build if name in providers):
        line = functools.partial(Result, *labels, case.logits, name)
        try:
            step = build[name](case, inputs)
            errors[name] = disagreement(case, step(), truth)
        except Unavailable as reason:
            lines[name] = line("skipped", str(reason))
            continue
        except Exception as error:
            # Libraries may raise anything (assertions, compiler errors, out of memory); bpo must not fail.
            if name in OURS:
                raise
            lines[name] = line("failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        value_limit, gradient_limit = TOLERANCES[case.dtype]
        if errors[name][0] > value_limit or errors[name][1] > gradient_limit:
            note = f"off by {errors[name][0]:.2g} nat (allowed {value_limit:g}) and, in a gradient, by "
            note += f"{errors[name][1]:.2g} (allowed {gradient_limit:g})"
            lines[name] = line("disagrees", note, value_error=errors[name][0], gradient_error=errors[name][1])
            continue
        steps[name] = step
    del truth
    samples = interleaved_ms(steps, case.device, sample_seconds)
    for name, step in steps.items():
        if profile_dir is not None:
            write_trace(step, profile_dir, case, name)
        lines[name] = _timed(case, labels, name, step, samples[name], errors[name])
    return [lines[name] for name in build if name in lines]


def _timed(
    case: Case,
    labels: tuple[str, str, str, int],
    name: str,
    step: Step,
    samples: list[float],
    errors: tuple[float, float],
) -> Result:
    flops, num_bytes = needed_work(case)
    ordered = sorted(samples)
    median_ms = statistics.median(ordered)
    p20_ms, p80_ms = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    tflop_per_s = gemm_share = None
    if flops:
        tflop_per_s = flops / median_ms / 1e9
        head = case.head
        gemm_share = tflop_per_s / gemm_roofline(case.num_rows, head.hidden_size, head.vocab, case.dtype, case.device)
    gb_per_s = num_bytes / median_ms / 1e6
    return Result(
        *labels,
        case.logits,
        name,
        "ok",
        "",
        median_ms,
        p20_ms,
        p80_ms,
        tflop_per_s,
        gemm_share,
        gb_per_s,
        gb_per_s / copy_gb_per_s(num_bytes, case.device),
        peak_extra_bytes(step, case.device),
        # On CUDA the count would miss the GEMMs of Triton kernels.
        counted_flops(step) if case.device.type == "cpu" else None,
        *errors,
    )


def write_trace(step: Step, folder: Path, case: Case, provider: str) -> Path:
    """Writes a Chrome trace of three runs of `step`, named after case and provider."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if case.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            with torch.profiler.record_function(f"{case.label} {provider}"):
                step()
        if case.device.type == "cuda":
            torch.cuda.synchronize()
    path = folder / f"{case.label} {provider}.json".replace(" ", "-")
    profile.export_chrome_trace(str(path))
    return path
