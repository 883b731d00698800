"""The order of the LM head's chunks, and the row kernels on a second stream.

tests/gpu/test_chunks_gpu.py runs the same on real streams.
"""

from __future__ import annotations

import os

import pytest
import torch

from bpo_kernels import chunks, head
from bpo_kernels.plain_head import ROWS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class RecordingStream:
    """Replaces the second stream: logs when the first stream waits for it."""

    def __init__(self, log: list[str]):
        self.log, self.num_events = log, 0

    def run(self, work):
        self.num_events += 1
        return work(), self.num_events - 1

    def join(self, event):
        self.log.append(f"wait {event}")


def test_the_first_stream_waits_for_rows_after_it_was_given_the_next_logits():
    log: list[str] = []
    second = RecordingStream(log)

    def rows(k, _):
        log.append(f"rows {k}")

    chunks.run_chunks(
        range(3), lambda k: log.append(f"logits {k}"), rows, lambda k, _: log.append(f"finish {k}"), second
    )
    given = [[f"logits {k}", f"rows {k}"] for k in range(3)]
    finished = [[f"wait {k}", f"finish {k}"] for k in range(3)]
    assert log == [*given[0], *given[1], *finished[0], *given[2], *finished[1], *finished[2]]


def test_with_one_stream_a_chunk_ends_before_the_next_begins():
    log: list[str] = []
    chunks.run_chunks(
        range(2),
        lambda k: log.append(f"logits {k}"),
        lambda k, _: log.append(f"rows {k}"),
        lambda k, _: log.append(f"finish {k}"),
        None,
    )
    assert log == [f"{what} {k}" for k in range(2) for what in ("logits", "rows", "finish")]


class LateStream:
    """Results of work are NaN until the first stream has waited for them."""

    def __init__(self):
        self.made: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def run(self, work):
        made = work()
        self.made.append(None if made is None else (made, made.clone()))
        if made is not None:
            made.fill_(torch.nan)
        return made, len(self.made) - 1

    def join(self, event):
        if self.made[event] is not None:
            late, true = self.made[event]
            late.copy_(true)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_two_streams_give_the_bits_of_one(monkeypatch, mode, trained):
    """A product that did not wait for its D would be NaN."""
    hidden_NH, weight_VH = torch.randn(11, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    target_N, coefficient_N = torch.randint(50, (11,)), torch.randn(11)
    plan = head.HeadPlan(mode, 3, mode == "store" and not trained, mode == "store" and trained)
    results = []
    for second in (None, LateStream()):
        monkeypatch.setattr(head, "_second_stream", lambda _, second=second: second)
        arguments = (hidden_NH, weight_VH, target_N, head.Head())
        outputs, *kept = head.head_forward(ROWS, *arguments, plan, num_policy=9)
        policy = (coefficient_N[:9], hidden_NH[:9], weight_VH, target_N[:9], head.Head())
        grads = head.head_backward(ROWS, *policy, plan.step, *kept, (True, trained, False))
        results.append([outputs.logp_n, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) == 2 + (trained and (mode == "recompute" or plan.keeps_dlogits))
    for once, again in zip(*results, strict=True):
        assert not once.isnan().any() and torch.equal(once, again)


@pytest.mark.parametrize(("rows", "expected"), [(511, 1), (1024, 2), (2048, 4), (8192, 4)])
def test_chunks_are_large_enough_for_a_gemm_and_few(rows, expected):
    assert chunks.overlapping_chunks(rows) == expected


def test_overlapping_divides_the_rows_and_halves_the_budget(monkeypatch):
    monkeypatch.setenv("BPO_KERNELS_OVERLAP", "1")
    kind, row_bytes = (torch.bfloat16, CUDA), 32768 * 6
    plans = [
        head.plan_head("store", rows, 32768, *kind, True, False, budget_rows * row_bytes, "store").step
        for rows, budget_rows in ((2048, 4096), (2048, 512), (300, 4096))
    ]
    assert plans == [512, 256, 300]  # four chunks; two of them within the budget; too few rows to divide


def test_the_switch_is_off_until_it_is_set_and_knows_its_words(monkeypatch):
    monkeypatch.delenv("BPO_KERNELS_OVERLAP", raising=False)
    assert not chunks.overlaps(torch.bfloat16, CUDA)
    monkeypatch.setenv("BPO_KERNELS_OVERLAP", "1")
    assert chunks.overlaps(torch.bfloat16, CUDA)
    assert not chunks.overlaps(torch.bfloat16, CPU) and not chunks.overlaps(torch.float32, CUDA)
    monkeypatch.setenv("BPO_KERNELS_OVERLAP", "yes")
    with pytest.raises(ValueError, match="BPO_KERNELS_OVERLAP is 'yes': set it to 1"):
        chunks.overlaps(torch.bfloat16, CUDA)


def test_the_benchmark_times_the_switch_and_puts_it_back(monkeypatch):
    from bpo_kernels.bench import providers as bench_providers
    from bpo_kernels.bench.cases import Case

    seen: list[str | None] = []
    monkeypatch.setattr(bench_providers, "_need_cuda", lambda case: None)
    monkeypatch.setattr(bench_providers.chunks, "can_overlap", lambda dtype, device: True)
    monkeypatch.setattr(bench_providers, "_ours", lambda *_: lambda: seen.append(os.environ.get("BPO_KERNELS_OVERLAP")))
    case = Case("linear_logprob", "frozen", "tiny", 8, "random", torch.bfloat16, CPU)
    step = bench_providers.PROVIDERS["linear_logprob"]["bpo-overlap"](case, None)
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv("BPO_KERNELS_OVERLAP", raising=False)
        else:
            monkeypatch.setenv("BPO_KERNELS_OVERLAP", before)
        step()
        assert seen.pop() == "1" and os.environ.get("BPO_KERNELS_OVERLAP") == before
