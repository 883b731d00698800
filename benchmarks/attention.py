"""Benchmark of attention over packed groups, forward and backward: each backend against separate sequences.

    python -m benchmarks.attention --count [--json FILE]       work and traffic of a layer, computed
    python -m benchmarks.attention [--device cpu --quick] [--json FILE] [--seconds S]

Every provider is compared with fp32 attention of each sequence before it is timed; backends that cannot run here are
reported with the reason. The target applies to the backend that `model.attention: auto` selects on this device.

Shape letters: B, H query heads, K key heads, T packed tokens, D head size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bpo.model.attention.choice import BackendName, Needs, choose_backend, obstacle
from bpo.model.attention.flex import BLOCK, flex_plan
from bpo.model.attention.shared_prefix import BACKENDS
from bpo.model.attention.varlen import varlen_plan
from bpo.records import PackedLayout
from bpo_kernels.bench.measure import interleaved_ms, machine, peak_extra_bytes

# Query heads, key heads, head size.
SHAPES = {"llava-1.5-7b": (32, 32, 128), "qwen2.5-vl-7b": (28, 4, 128), "tiny": (4, 2, 32)}
# Tokens of the prefix (576 of an image, and a prompt) and of each completion, repeated until a row is full.
GROUPS = ((620, (90, 140)), (655, (60, 210, 120)), (612, (35, 48)), (700, (180, 150, 95)))
TINY_GROUPS = ((120, (20, 30)), (131, (9, 40, 17)))
# Minimum speedup of shared prefixes over separate sequences, at this number of tokens.
TARGET_RATIO, TARGET_TOKENS = 1.4, 8192
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}


@dataclass
class Line:
    """Result of one provider: status ok, skipped, failed or disagrees; times of one layer, forward and backward."""

    shape: str
    groups: int
    tokens: int
    provider: str
    status: str
    note: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    peak_mib: float | None = None


def row_of(num_tokens: int, groups: Sequence[tuple[int, Sequence[int]]] = GROUPS) -> PackedLayout:
    """A row of the given groups, repeated as often as `num_tokens` allows."""
    prefixes, completions, end, number = [], [], 0, 0
    while end + groups[number % len(groups)][0] + sum(groups[number % len(groups)][1]) <= num_tokens:
        prefix, lengths = groups[number % len(groups)]
        prefixes.append((end, end + prefix))
        end += prefix
        spans = []
        for length in lengths:
            spans.append((end, end + length))
            end += length
        completions.append(tuple(spans))
        number += 1
    return PackedLayout(tuple(prefixes), tuple(completions))


def sequences_of(layout: PackedLayout) -> list[list[int]]:
    """Row indices of [prefix | completion] for each completion."""
    return [
        [*range(*prefix), *range(*span)]
        for prefix, spans in zip(layout.prefix_spans, layout.completion_spans, strict=True)
        for span in spans
    ]


def _tiles(queries: int, keys: int) -> int:
    """Number of blocks that a causal kernel visits for a sequence, aligned bottom-right."""
    last_keys = (min(keys, keys - queries + (row + 1) * BLOCK) for row in range(-(-queries // BLOCK)))
    return sum(-(-last // BLOCK) for last in last_keys)


def counted(layout: PackedLayout, shape: tuple[int, int, int], element_bytes: int = 2) -> dict[str, dict[str, float]]:
    """GFLOP of the visited blocks, forward and backward (7 products each), and additional memory traffic.

    `moved_mb`: MB that a layer reads and writes, forward and backward, excluding queries, keys, values, output and
    their gradients.
    """
    heads, key_heads, size = shape
    tokens = num_tokens(layout)
    alone = [len(rows) for rows in sequences_of(layout)]
    plan = varlen_plan(layout, torch.device("cpu"))
    varlen = zip(plan.cu_seqlens_q_S1.diff().tolist(), plan.cu_seqlens_k_S1.diff().tolist(), strict=True)
    mask = flex_plan(layout, torch.device("cpu")).mask
    two_calls, mask_elements = 0, 0
    for prefix, spans in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        of_prefix, of_spans = prefix[1] - prefix[0], spans[-1][1] - prefix[1]
        two_calls += _tiles(of_prefix, of_prefix) + -(-of_spans // BLOCK) * -(-(of_prefix + of_spans) // BLOCK)
        mask_elements += of_spans * (of_prefix + of_spans)
    row = key_heads * size * element_bytes
    # Forward: copies of keys and values are written and read; backward: their gradients are read and summed.
    gathered = 2 * (2 * len(plan.rows_R) + len(plan.rows_R) + tokens) * row
    # Output and gradients are concatenated from pieces; a mask is read for every head, forward and backward.
    joined = 4 * tokens * heads * size * element_bytes + 2 * heads * mask_elements * element_bytes
    blocks = {
        "separate": (sum(_tiles(length, length) for length in alone), 0),
        "sdpa": (two_calls, joined),
        "varlen": (sum(_tiles(queries, keys) for queries, keys in varlen), gathered),
        "flex": (int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()), 0),
    }
    flops_of_block = 2 * BLOCK * BLOCK * size * heads
    result = {
        name: {"gflop": 7 * count * flops_of_block / 1e9, "moved_mb": moved / 1e6, "blocks": count}
        for name, (count, moved) in blocks.items()
    }
    of_prefixes = sum(end - start for start, end in layout.prefix_spans)
    # If a prefix were a separate sequence, its first completion would need a copy of it too.
    result["varlen"] |= {  # the same for flash-attn 2, 3 and PyTorch's varlen_attn
        "gathered_rows": len(plan.rows_R),
        "rows_if_prefixes_were_sequences": len(plan.rows_R) + of_prefixes,
    }
    return result


def alone_in_fp32(qkv: Sequence[torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """[B, T, H, D] from one causal attention per completion; a prefix's output is that of its last completion."""
    query, key, value = (x.float() for x in qkv)
    output = torch.zeros_like(query)
    for rows in sequences_of(layout):
        output[:, :, rows] = F.scaled_dot_product_attention(
            *(x[:, :, rows] for x in (query, key, value)), is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
        )
    return output.transpose(1, 2)


def separate(layout: PackedLayout, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Callable:
    """Builds the step over padded rows of [prefix | completion], without shared prefixes."""
    heads, key_heads, size = shape
    alone = sequences_of(layout)
    longest = max(map(len, alone))
    qkv = [
        torch.randn(len(alone), count, longest, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    weight = torch.randn_like(qkv[0])

    def step() -> None:
        output = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=heads != key_heads)
        torch.autograd.grad(output, qkv, weight)

    return step


def run_case(
    name: str, layout: PackedLayout, device: torch.device, dtype: torch.dtype, sample_seconds: float, deadline: float
) -> list[Line]:
    """Times separate sequences and every backend that runs here and agrees with fp32, interleaved.

    Args:
        sample_seconds: For each provider; less if `deadline` (of `time.monotonic`) is near.
        deadline: No provider starts after it.
    """
    shape = SHAPES[name]
    qkv, weight = case_inputs(shape, num_tokens(layout), device, dtype)
    truth = alone_in_fp32(qkv, layout)
    wanted = [truth.detach(), *torch.autograd.grad(truth, qkv, weight.float())]
    lines: list[Line] = []
    steps: dict[str, Callable[[], Any]] = {"separate": separate(layout, shape, device, dtype)}
    peaks = {"separate": peak_extra_bytes(steps["separate"], device) / 2**20}

    def line(provider: str, status: str, note: str = "", **figures: float) -> Line:
        return Line(name, len(layout.prefix_spans), num_tokens(layout), provider, status, note, **figures)

    for backend in BACKENDS:
        why_not = obstacle(backend, Needs(device, dtype, shape[2]))
        if why_not is not None:
            lines.append(line(backend, "skipped", f"model.attention is {backend}, but {why_not}"))
            continue
        if time.monotonic() > deadline:
            lines.append(line(backend, "skipped", "no time was left"))
            continue
        step = packed_step(backend, qkv, weight, layout)
        try:
            got = step()
        except Exception as error:  # of a library or a compiler: reported in its line, the others still run
            lines.append(line(backend, "failed", f"{type(error).__name__}: {error}"[:500]))
            continue
        errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True)]
        if not max(errors) <= TOLERANCE[dtype]:
            lines.append(line(backend, "disagrees", f"relative errors of output, dq, dk, dv: {errors}"))
            continue
        steps[backend], peaks[backend] = step, peak_extra_bytes(step, device) / 2**20
    sample_seconds = max(0.0, min(sample_seconds, (deadline - time.monotonic()) / len(steps)))
    for provider, samples in interleaved_ms(steps, device, sample_seconds).items():
        ordered = sorted(samples)
        p20, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
        median = statistics.median(ordered)
        lines.append(line(provider, "ok", median_ms=median, p20_ms=p20, p80_ms=p80, peak_mib=peaks[provider]))
    return lines


def num_tokens(layout: PackedLayout) -> int:
    return max(end for spans in (layout.prefix_spans, *layout.completion_spans) for _, end in spans)


def case_inputs(
    shape: tuple[int, int, int], tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries, keys and values [1, heads, tokens, head size] as projections return them, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, tokens, count, shape[2], generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
        for count in (shape[0], shape[1], shape[1])
    ]
    return qkv, torch.randn(1, tokens, shape[0], shape[2], generator=generator).to(device, dtype)


def verdict(
    name: str, tokens: int, layout: PackedLayout, lines: Sequence[Line], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The target for one shape, as an entry of `targets`: `met` is None if it was not measured.

    It applies to the backend that `auto` selects; `layout` is the row of at most `tokens`. The prediction is the ratio
    of visited blocks, assuming that every kernel processes them at the same rate.
    """
    heads, key_heads, size = SHAPES[name]
    backend = choose_backend("auto", Needs(device, dtype, size, copies_keys=key_heads == heads)).backend
    work = counted(layout, SHAPES[name])
    predicted = work["separate"]["blocks"] / work["varlen" if backend in ("flash3", "flash") else backend]["blocks"]
    entry = {
        "target": f"packed attention: >= {TARGET_RATIO}x separate sequences ({name}, {tokens:,} tokens, {backend})",
        "predicted": f"{predicted:.2f}x (visited blocks)",
        "measured": "not measured",
        "met": None,
    }
    times = {line.provider: line.median_ms for line in lines if line.median_ms is not None}
    if device.type != "cuda" or tokens != TARGET_TOKENS or not {"separate", backend} <= times.keys():
        return entry
    ratio = times["separate"] / times[backend]
    return entry | {"measured": f"{ratio:.2f}x", "met": ratio >= TARGET_RATIO}


def packed_step(
    backend: BackendName, qkv: list[torch.Tensor], weight: torch.Tensor, layout: PackedLayout
) -> Callable[[], list[torch.Tensor]]:
    """One layer's pass; the plan is computed beforehand, as training does once per batch for all layers."""
    way = BACKENDS[backend]
    plan = way.plan(layout, qkv[0].device)

    def step() -> list[torch.Tensor]:
        output = way.attend(*qkv, plan)
        return [output.detach(), *torch.autograd.grad(output, qkv, weight)]

    return step


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="only compute work and traffic")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few samples")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="tokens of a packed row")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llava-1.5-7b", "qwen2.5-vl-7b"])
    parser.add_argument("--sample-seconds", type=float, default=1.0, help="for each provider")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no provider starts after this time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.shapes, arguments.tokens, arguments.sample_seconds = ["tiny"], [512], 0.0
    if arguments.device == "cuda" and not arguments.count and not torch.cuda.is_available():
        parser.error("no CUDA GPU: use --device cpu --quick for a dry run, --count to compute work and traffic")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a backend failed or disagreed; its line has the reason."""
    begin = time.monotonic()
    arguments = _arguments(argv)
    device = torch.device("cpu" if arguments.count else arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report: dict[str, Any] = {"machine": machine(device), "results": [], "not_run": []}
    if not arguments.count:
        report["targets"] = []
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            layout = row_of(tokens, TINY_GROUPS if shape == "tiny" else GROUPS)
            if arguments.count:
                report["results"].append({"shape": shape, "tokens": tokens} | counted(layout, SHAPES[shape]))
            else:
                lines = []
                if time.monotonic() - begin > arguments.seconds:
                    report["not_run"].append(f"attention {shape} T={tokens}: no time was left")
                else:
                    lines = run_case(shape, layout, device, dtype, arguments.sample_seconds, begin + arguments.seconds)
                report["results"] += map(asdict, lines)
                report["targets"].append(verdict(shape, tokens, layout, lines, device, dtype))
            if arguments.json:  # after every case, so that a stopped process keeps its results
                arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return int(any(line.get("status") in ("failed", "disagrees") for line in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
