"""Training metrics under their standard names, written to JSONL and TensorBoard.

Shape letters: P pairs, K completions, N response tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bpo.job.durable import write_durably
from bpo.job.journal import JournalReader, to_line
from bpo.losses import LossOutput
from bpo.records import GroupBatch, LostGroup, UsefulWork
from bpo.training.flops import ModelFlops

_NAMES = (
    "loss",
    "preference_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll/chosen",
)
_NUM_WEIGHTED = 2  # the losses, which training minimises; the other means count each pair once, whatever its weight


@dataclass(frozen=True)
class _Unread:
    """A micro-batch's sums (`_NAMES` and the reference gap), still on the device, and the groups of its losses."""

    sums: torch.Tensor
    loss_P: torch.Tensor
    pairs_P2: torch.Tensor
    group_of_completion: tuple[str, ...]


@dataclass
class StepSums:
    """Sums over the pairs of one rank's part of a step; metrics once summed over ranks and divided by the pairs.

    `add` leaves its sums on the device, because reading one waits for all queued work. `flat` reads them together;
    until then `values`, `reference_gap` and `non_finite_groups` lack the latest additions.
    """

    values: list[float]
    num_pairs: float = 0.0
    num_tokens: float = 0.0
    useful_work: UsefulWork = field(default_factory=UsefulWork)
    reference_gap: float = 0.0
    expected_first_loss: float = 0.0
    groups: list[str] = field(default_factory=list)
    non_finite_groups: list[str] = field(default_factory=list)
    lost: list[LostGroup] = field(default_factory=list)
    _unread: list[_Unread] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def zero(cls) -> StepSums:
        return cls([0.0] * len(_NAMES))

    @torch.no_grad()
    def add(self, output: LossOutput, batch: GroupBatch) -> None:
        """Adds a micro-batch; of fillers, whose pairs have weight 0, only the lost groups."""
        self.lost.extend(batch.lost)
        if batch.is_filler:
            return
        inputs = batch.loss_inputs
        assert inputs.reference is not None
        logp_K = inputs.sequence_sum(output.logp_N)
        chosen, rejected = inputs.pairs_P2.unbind(1)
        columns = (
            output.loss_P,
            output.preference_P,
            output.chosen_reward_P,
            output.rejected_reward_P,
            output.chosen_reward_P - output.rejected_reward_P,
            (output.chosen_reward_P > output.rejected_reward_P).float(),
            logp_K[chosen],
            logp_K[rejected],
            output.nll_P,
        )
        gap = (output.logp_N - inputs.reference).abs().max()
        values = torch.stack(columns).double()
        values[:_NUM_WEIGHTED] *= inputs.pair_weight_P.double()
        sums = values @ torch.ones_like(values[0])
        # Not the batch itself: its pixels would stay on the device until the end of the step.
        owners = tuple(
            g for g, spans in zip(batch.group_ids, batch.layout.completion_spans, strict=False) for _ in spans
        )
        self._unread.append(
            _Unread(torch.cat([sums, gap.double()[None]]), output.loss_P.detach(), inputs.pairs_P2, owners)
        )
        self.num_pairs += inputs.pair_weight_P.numel()
        self.num_tokens += batch.input_ids_T.numel()
        self.useful_work += batch.useful_work
        self.groups.extend(batch.group_ids)

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        for (*sums, gap), part in zip(torch.stack([part.sums for part in unread]).tolist(), unread, strict=True):
            self.values = [value + more for value, more in zip(self.values, sums, strict=True)]
            self.reference_gap = max(self.reference_gap, gap)
            if not math.isfinite(sums[0]):
                lost = part.pairs_P2[~torch.isfinite(part.loss_P), 0].tolist()
                self.non_finite_groups.extend(sorted({part.group_of_completion[c] for c in lost}))

    def flat(self) -> list[float]:
        """This rank's sums and work as one list, to be summed over ranks."""
        self._read()
        work = map(float, astuple(self.useful_work))
        return [*self.values, self.num_pairs, self.num_tokens, *work, float(len(self.lost))]


def step_metrics(flat: list[float]) -> dict[str, float]:
    """Means over the pairs of the global batch, from the flat sums of all ranks; none if it has lost all its groups.

    Losses are weighted by the pairs' weights and divided by the number of pairs, as in `run_step`.
    """
    pairs = flat[len(_NAMES)]
    if not pairs:
        return {}
    return {name: value / pairs for name, value in zip(_NAMES, flat, strict=False)}


def num_lost(flat: list[float]) -> int:
    """Groups that the step has lost, from the flat sums of all ranks."""
    return int(flat[-1])


def step_rates(
    flat: list[float], seconds: float, flops: ModelFlops | None = None, peak_flops: float | None = None
) -> dict[str, float]:
    """Throughput of a step over all ranks, from the flat sums of all ranks.

    Args:
        flat: Sums of `StepSums.flat` over the ranks.
        seconds: From the step's first forward pass to the end of the optimizer's step.
        flops: Of the model; adds `model_tflops_per_second`, useful FLOPs only (bpo/training/flops.py).
        peak_flops: FLOP/s of all devices together; adds `mfu`, the useful share of it.

    Returns:
        `tokens_per_second` counts packed tokens through the language model, `useful_tokens_per_second` only
        those of groups, without stand-in images, padding and repeated prefixes.
    """
    num_pairs, num_tokens = flat[len(_NAMES) : len(_NAMES) + 2]
    work = UsefulWork(*map(int, flat[len(_NAMES) + 2 : -1]))
    rates = {
        "pairs_per_second": num_pairs / seconds,
        "tokens_per_second": num_tokens / seconds,
        "useful_tokens_per_second": work.tokens / seconds,
        "step_seconds": seconds,
    }
    if flops is not None:
        rates["model_tflops_per_second"] = flops.step(work) / seconds / 1e12
        if peak_flops:
            rates["mfu"] = flops.step(work) / seconds / peak_flops
    return rates


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard on rank 0; on other ranks it does nothing."""

    def __init__(self, output_dir: Path, *, enabled: bool, tensorboard: bool, start_step: int):
        self._file = None
        self._board: Any = None
        if not enabled:
            return
        path = output_dir / "metrics.jsonl"
        _drop_from(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _drop_from(path: Path, start_step: int) -> None:
    """Replaces the file without the steps that a resumed run repeats, so that each step is logged exactly once.

    Lines that are not metrics, such as one that a power failure has damaged, are dropped with a warning.
    """
    if path.exists():
        read = JournalReader(path).poll(lambda entry: (int(entry["step"]), entry))
        write_durably(path, b"".join(to_line(entry) for _, (step, entry) in read if step <= start_step))
