"""Launches every kernel once, forward and backward, on small shapes, and compares it with plain PyTorch.

    python -m benchmarks.gpu_set.smoke [--device cpu] [--json FILE]

Prints one line per launch, so that a kernel that does not compile, launch or agree is detected within seconds. On a CPU
it runs Triton's interpreter with TRITON_INTERPRET=1 BPO_KERNELS=triton, otherwise plain PyTorch. Exit status 1: one
launch failed.

Legend: N rows, H hidden size, V vocabulary, K completions, P pairs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_set.parts import why_no_interpreter
from bpo_kernels import dispatch, plain

# (nats of a value, relative Frobenius error of a gradient) by dtype.
TOLERANCES = {torch.bfloat16: (2e-2, 5e-2), torch.float32: (1e-3, 1e-3)}
NUM_ROWS, HIDDEN = 16, 256
# Each of these selects a different row kernel: short rows, rows that fit the registers, longer ones.
VOCABULARIES = (1031, 32064, 49152, 152064)
# Sizes for the interpreter, which takes seconds for a long row.
SMALL = (6, 64, (1031,))

Run = Callable[[Any], list[Tensor]]


@dataclass
class Line:
    """One launch: status ok or failed, and the error in `note`."""

    operation: str
    name: str
    status: str
    seconds: float
    note: str = ""


def _gradients(values: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    wanted = [tensor for tensor in wanted if tensor.requires_grad]
    return [values.detach(), *torch.autograd.grad(values.sum(), wanted)] if wanted else [values]


def gather_run(dtype: torch.dtype, num_rows: int, vocab: int, device: torch.device) -> Run:
    logits_NV = torch.randn(num_rows, vocab, device=device).to(dtype).requires_grad_()
    target_N = torch.randint(vocab, (num_rows,), device=device)
    return lambda module: _gradients(module.logprob_gather(logits_NV, target_N), [logits_NV])


def head_run(
    mode: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    device: torch.device,
    *,
    trained: bool = False,
    forward: bool = False,
    **options: Any,
) -> Run:
    num_rows, hidden, vocab = sizes
    hidden_NH = torch.randn(num_rows, hidden, device=device).to(dtype).requires_grad_(not forward)
    weight_VH = torch.randn(vocab, hidden, device=device).mul_(hidden**-0.5).to(dtype).requires_grad_(trained)
    target_N = torch.randint(vocab, (num_rows,), device=device)
    if options.pop("capped", False):
        options |= {"bias": torch.randn(vocab, device=device).to(dtype), "softcap": 20.0}

    def run(module: Any) -> list[Tensor]:
        found = module.linear_logprob(hidden_NH, weight_VH, target_N, mode=mode, **options)
        values = found[0] if options.get("statistics") else found
        return _gradients(values, [hidden_NH, weight_VH]) + list(found[1::2] if options.get("statistics") else [])

    return run


def second_target_run(dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device) -> Run:
    num_rows, hidden, vocab = sizes
    logp_N = (-torch.rand(num_rows, device=device)).requires_grad_()
    hidden_NH = torch.randn(num_rows, hidden, device=device).to(dtype).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, device=device).mul_(hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (2, num_rows), device=device)
    tensors = (logp_N, hidden_NH, weight_VH)
    return lambda module: _gradients(module.second_target_logprob(*tensors, targets[0], targets[1]), list(tensors))


def _pairs(num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Two completions, one pair; the first is the longer one."""
    first = num_rows // 2 + 1
    completion_N = (torch.arange(num_rows, device=device) >= first).long()
    starts_K1 = torch.tensor([0, first, num_rows], device=device)
    return {"completion": completion_N, "pairs": torch.tensor([[0, 1]], device=device), "starts": starts_K1}


def pair_loss_run(loss_type: str, with_starts: bool, num_rows: int, device: torch.device) -> Run:
    policy_N = (-torch.rand(num_rows, device=device)).requires_grad_()
    reference_N, pairs = -torch.rand(num_rows, device=device), _pairs(num_rows, device)
    arguments = (policy_N, reference_N, pairs["completion"], pairs["pairs"], 0.1)
    options: dict[str, Any] = {"loss_type": loss_type, "num_completions": 2}
    options |= {"completion_starts_K1": pairs["starts"]} if with_starts else {}
    return lambda module: _gradients(module.preference_loss(*arguments, **options)[0], [policy_N])


def terms_run(with_starts: bool, num_rows: int, device: torch.device) -> Run:
    """Pairs with their own beta and weight, one with an anchor."""
    policy_N = (-torch.rand(num_rows, device=device)).requires_grad_()
    reference_N, pairs = -torch.rand(num_rows, device=device), _pairs(num_rows, device)
    pairs_P2 = torch.tensor([[0, 1], [-1, 1]], device=device)
    options: dict[str, Any] = {"num_completions": 2, "pair_beta_P": torch.tensor([1.0, 2.0], device=device)}
    options |= {"pair_weight_P": torch.tensor([0.5, 3.0], device=device)}
    options |= {"completion_starts_K1": pairs["starts"]} if with_starts else {}
    arguments = (policy_N, reference_N, pairs["completion"], pairs_P2, 0.1)
    return lambda module: _gradients(module.preference_loss(*arguments, **options)[0], [policy_N])


def many_pairs_run(device: torch.device) -> Run:
    """More pairs than the kernels of a training step support: separate launches for sums and coefficients."""
    num_pairs, tokens = 150, 4
    completion_N = torch.arange(2 * num_pairs, device=device).repeat_interleave(tokens)
    policy_N = (-torch.rand(completion_N.shape[0], device=device)).requires_grad_()
    reference_N = -torch.rand(completion_N.shape[0], device=device)
    pairs_P2 = torch.arange(2 * num_pairs, device=device).view(num_pairs, 2)
    starts_K1 = torch.arange(2 * num_pairs + 1, device=device) * tokens
    arguments = (policy_N, reference_N, completion_N, pairs_P2, 0.1)
    options: dict[str, Any] = {"num_completions": 2 * num_pairs, "completion_starts_K1": starts_K1}
    return lambda module: _gradients(module.preference_loss(*arguments, **options)[0], [policy_N])


def head_loss_run(live: bool, sizes: tuple[int, int, int], device: torch.device) -> Run:
    num_rows, hidden, vocab = sizes
    dtype = torch.bfloat16
    hidden_NH = torch.randn(num_rows, hidden, device=device).to(dtype).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, device=device).mul_(hidden**-0.5).to(dtype)
    target_N = torch.randint(vocab, (num_rows,), device=device)
    other = torch.randn(num_rows, hidden, device=device).to(dtype) if live else -torch.rand(num_rows, device=device)
    pairs = _pairs(num_rows, device)
    arguments = (hidden_NH, weight_VH, target_N, other, pairs["completion"], pairs["pairs"], 0.1)
    options = {"num_completions": 2, "completion_starts_K1": pairs["starts"]}
    return lambda module: _gradients(module.linear_preference_loss(*arguments, **options)[0], [hidden_NH])


def lora_run(mode: str, dropout: float, num_rows: int, hidden: int, device: torch.device) -> Run:
    """Two layers of one input, the second narrower."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    x_TD, outputs = random(num_rows, hidden).requires_grad_(), (96, 48)
    weights = [random(size, hidden) / hidden**0.5 for size in outputs]
    lora_a = [(random(8, hidden) / hidden**0.5).requires_grad_() for _ in outputs]
    lora_b = [random(size, 8).requires_grad_() for size in outputs]
    seed = torch.tensor([3], device=device)
    arguments = (x_TD, weights, [None, random(outputs[1])], lora_a, lora_b, [0.5, 0.5])

    def run(module: Any) -> list[Tensor]:
        results = module.lora_linear(*arguments, dropout=dropout, seed=seed, stream=2, mode=mode)
        return _gradients(torch.cat([one.float() for one in results], dim=1) / 8, [x_TD, *lora_a, *lora_b])

    return run


def launches(device: torch.device) -> list[tuple[str, str, torch.dtype, Callable[[], Run]]]:
    """(operation, name, dtype, function that builds the inputs and returns the run)."""
    num_rows, hidden, vocabularies = SMALL if device.type == "cpu" else (NUM_ROWS, HIDDEN, VOCABULARIES)
    half, full = torch.bfloat16, torch.float32
    found: list[tuple[str, str, torch.dtype, Callable[[], Run]]] = []

    def add(operation: str, name: str, dtype: torch.dtype, build: Callable[..., Run], *words: Any, **more: Any) -> None:
        found.append((operation, name, dtype, functools.partial(build, *words, **more)))

    short = (num_rows, hidden, vocabularies[0])
    for vocab in vocabularies:
        add("logprob_gather", f"bf16 V={vocab}", half, gather_run, half, num_rows, vocab, device)
        sizes = (num_rows, hidden, vocab)
        add("linear_logprob", f"store, frozen, bf16 V={vocab}", half, head_run, "store", half, sizes, device)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        name = f"{loss_type}, with offsets"
        add("preference_loss", name, full, pair_loss_run, loss_type, True, 4 * num_rows, device)
    add("preference_loss", "sigmoid, any order", full, pair_loss_run, "sigmoid", False, 4 * num_rows, device)
    add("preference_loss", "sigmoid, many pairs", full, many_pairs_run, device)
    for with_starts in (True, False):
        name = f"own betas and weights, an anchor, {'with offsets' if with_starts else 'any order'}"
        add("preference_loss", name, full, terms_run, with_starts, 4 * num_rows, device)
    for name, dtype in (("bf16", half), ("fp32", full)):
        add("second_target_logprob", name, dtype, second_target_run, dtype, short, device)
    for live in (False, True):
        name = f"{'live' if live else 'stored'} reference, bf16"
        add("linear_preference_loss", name, half, head_loss_run, live, short, device)
    for mode, dropout in (("fused", 0.25), ("addmm", 0.0)):
        name = f"{mode}, dropout {dropout:g}, bf16"
        add("lora_linear", name, half, lora_run, mode, dropout, num_rows, hidden, device)
    for mode in ("store", "recompute", "fused"):
        name = f"{mode}, trained, bf16"
        add("linear_logprob", name, half, head_run, mode, half, short, device, trained=True)
    wide = (num_rows, hidden, vocabularies[min(1, len(vocabularies) - 1)])
    for mode in ("store", "fused"):
        add("linear_logprob", f"{mode}, forward, bf16", half, head_run, mode, half, wide, device, forward=True)
    capped = {"capped": True, "statistics": True}
    for mode in ("store", "fused"):
        name = f"{mode}, frozen, bf16, bias, cap, statistics"
        add("linear_logprob", name, half, head_run, mode, half, short, device, **capped)
    add("linear_logprob", "store, frozen, fp32", full, head_run, "store", full, short, device)
    add("logprob_gather", "fp32", full, gather_run, full, num_rows, vocabularies[0], device)
    return found


def disagreement(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> str:
    """Describes what differs by more than rounding; empty if nothing does."""
    value_limit, gradient_limit = TOLERANCES[dtype]
    value_error = float((got[0].float() - wanted[0].float()).abs().max())
    if not value_error <= value_limit:
        return f"off by {value_error:.2g} (at most {value_limit:g})"
    for position, (ours, theirs) in enumerate(zip(got[1:], wanted[1:], strict=True)):
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not error <= gradient_limit:
            return f"output {position + 1} is off by {error:.2g} of its norm (at most {gradient_limit:g})"
    return ""


def launch(operation: str, name: str, dtype: torch.dtype, build: Callable[[], Run]) -> Line:
    """Runs one kernel in both implementations and compares the results."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    try:
        run = build()
        note = disagreement(run(dispatch), run(plain), dtype)
    except Exception as error:  # compilers and drivers raise arbitrary errors; reported in the line and exit status
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Line(operation, name, "failed" if note else "ok", round(time.perf_counter() - begin, 2), note)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    report: dict[str, Any] = {"implementation": dispatch.chosen_implementation(torch.empty(0, device=device))}
    if report["implementation"] == "plain" and device.type == "cpu":
        report["note"] = f"plain PyTorch, no kernel was launched: {why_no_interpreter() or 'TRITON_INTERPRET is not 1'}"
        print(report["note"])
    report["lines"] = []
    for words in launches(device):
        line = launch(*words)
        report["lines"].append(asdict(line))
        print(f"{line.status:6} {line.seconds:6.2f} s  {line.operation}: {line.name}  {line.note}".rstrip(), flush=True)
        if options.json:  # after each launch, so that a driver crash keeps the earlier ones
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(line["status"] == "failed" for line in report["lines"]))


if __name__ == "__main__":
    sys.exit(main())
