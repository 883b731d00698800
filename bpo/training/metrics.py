"""Training metrics under their standard names, written to JSONL and TensorBoard.

Shape letters: P pairs, K completions, N response tokens.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from bpo.job.durable import write_durably
from bpo.job.journal import JournalReader, to_line
from bpo.losses.program import LossOutput, LossProgram
from bpo.model.attention.rows import to_device
from bpo.records import GroupBatch, LostGroup, UsefulWork
from bpo.training.flops import ModelFlops
from bpo.training.trackers import Trackers

# Means over the pairs of `LossProgram.main`, each counted once whatever its weight.
_REWARDS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll/chosen",
)
_OF_CHOSEN = ("rewards/chosen", "logps/chosen", "nll/chosen")  # those that a likelihood term has


@dataclass(frozen=True)
class _Unread:
    """A micro-batch's sums (terms, rewards, reference gap), still on the device, and the groups of its losses."""

    sums: torch.Tensor
    loss_P: torch.Tensor
    group_of_pair: tuple[str, ...]


@dataclass
class StepSums:
    """Sums over the pairs of one rank's part of a step; metrics once summed over ranks and divided by the pairs.

    `add` leaves its sums on the device, because reading one waits for all queued work. `flat` reads them together;
    until then `terms`, `rewards`, `reference_gap`, `expected_first_loss` and `non_finite_groups` lack the latest
    additions.

    terms: sum over the pairs of each term of pair weight times loss.
    rewards: of the pairs that rewards are reported of; num_rewarded counts them.
    """

    terms: list[float]
    rewards: list[float] = field(default_factory=lambda: [0.0] * len(_REWARDS))
    num_rewarded: float = 0.0
    num_pairs: float = 0.0
    num_tokens: float = 0.0
    useful_work: UsefulWork = field(default_factory=UsefulWork)
    reference_gap: float = 0.0
    expected_first_loss: float = 0.0
    groups: list[str] = field(default_factory=list)
    non_finite_groups: list[str] = field(default_factory=list)
    lost: list[LostGroup] = field(default_factory=list)
    _unread: list[_Unread] = field(default_factory=list, repr=False, compare=False)
    _expected: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def zero(cls, program: LossProgram) -> StepSums:
        return cls([0.0] * len(program.terms))

    @torch.no_grad()
    def add(self, output: LossOutput, batch: GroupBatch) -> None:
        """Adds a micro-batch; of fillers, whose pairs have weight 0, only the lost groups."""
        self.lost.extend(batch.lost)
        if batch.is_filler:
            return
        inputs, rewards = batch.loss_inputs, output.rewards
        chosen_P = rewards.chosen_reward_P
        none_P = torch.zeros_like(chosen_P)
        rejected_P = none_P if rewards.rejected_reward_P is None else rewards.rejected_reward_P
        rejected_logp_P = none_P if rewards.rejected_logp_P is None else rewards.rejected_logp_P
        margin_P = chosen_P - rejected_P
        columns = (
            chosen_P,
            rejected_P,
            margin_P,
            (margin_P > 0).float(),
            rewards.chosen_logp_P,
            rejected_logp_P,
            rewards.chosen_nll_P,
        )
        sums = torch.cat([output.term_sums_T.double(), torch.stack(columns).double().sum(1), _gap(output, batch)[None]])
        owners = tuple(batch.group_ids[g] for g in inputs.group_of_pair)
        # Not the batch itself: its pixels would stay on the device until the end of the step.
        self._unread.append(_Unread(sums, output.loss_P, owners))
        self.num_rewarded += len(chosen_P)
        self.num_pairs += batch.num_pairs
        self.num_tokens += batch.input_ids_T.numel()
        self.useful_work += batch.useful_work
        self.groups.extend(batch.group_ids)

    def expect(self, loss: torch.Tensor) -> None:
        """Adds the loss of a micro-batch for policy = reference, in the first step."""
        self._expected.append(loss.detach().double())

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        expected, self._expected = self._expected, []
        if expected:
            self.expected_first_loss += torch.stack(expected).sum().item()
        if not unread:
            return
        count = len(self.terms)
        for (*sums, gap), part in zip(torch.stack([part.sums for part in unread]).tolist(), unread, strict=True):
            self.terms = [value + more for value, more in zip(self.terms, sums[:count], strict=True)]
            self.rewards = [value + more for value, more in zip(self.rewards, sums[count:], strict=True)]
            self.reference_gap = max(self.reference_gap, gap)
            if not all(map(math.isfinite, sums[:count])):
                lost = (~torch.isfinite(part.loss_P)).nonzero().flatten().tolist()
                self.non_finite_groups.extend(sorted({part.group_of_pair[p] for p in lost}))

    def flat(self) -> list[float]:
        """This rank's sums and work as one list, to be summed over ranks."""
        self._read()
        return self._on_host()

    def on_device(self) -> torch.Tensor:
        """`flat` as a tensor [S] in fp64, without reading the device."""
        flat_S = torch.tensor(self._on_host(), dtype=torch.float64)
        if not self._unread:
            return flat_S
        sums = functools.reduce(torch.add, [part.sums[:-1] for part in self._unread])
        return to_device(flat_S, sums.device) + F.pad(sums, (0, len(flat_S) - len(sums)))

    def _on_host(self) -> list[float]:
        work = map(float, astuple(self.useful_work))
        losses = [*self.terms, *self.rewards, self.num_rewarded]
        return [*losses, self.num_pairs, self.num_tokens, *work, float(len(self.lost))]


def step_metrics(flat: list[float], program: LossProgram) -> dict[str, float]:
    """Means over the pairs of the global batch, from the flat sums of all ranks; none if it has lost all its groups.

    Losses are weighted by the pairs' weights and divided by the number of preference pairs, as in `run_step`. If there
    are several terms, each is also reported under its name, before its weight is applied.

    Args:
        program: The loss, for the names and weights of its terms.
    """
    count = len(program.terms)
    sums, rewards = flat[:count], flat[count : count + len(_REWARDS)]
    num_rewarded, pairs = flat[count + len(_REWARDS) : count + len(_REWARDS) + 2]
    if not pairs:
        return {}
    losses = [term.options.weight * value / pairs for term, value in zip(program.terms, sums, strict=True)]
    preference = [loss for term, loss in zip(program.terms, losses, strict=True) if not term.is_likelihood]
    metrics = {"loss": math.fsum(losses), "preference_loss": math.fsum(preference or losses)}
    for name, value in zip(_REWARDS, rewards, strict=True):
        if num_rewarded and (program.compares_answers or name in _OF_CHOSEN):
            metrics[name] = value / num_rewarded
    if count > 1:
        metrics |= {f"loss/{name}": value / pairs for name, value in zip(program.names, sums, strict=True)}
    return metrics


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
    first_work = -1 - len(fields(UsefulWork))
    num_pairs, num_tokens = flat[first_work - 2 : first_work]
    work = UsefulWork(*map(int, flat[first_work:-1]))
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


def _gap(output: LossOutput, batch: GroupBatch) -> torch.Tensor:
    """The largest difference of a token's log-prob from the reference's, fp64; 0 without a reference."""
    inputs = batch.loss_inputs
    if inputs.reference is None:
        return output.logp_N.new_zeros((), dtype=torch.float64)
    gap_N = (output.logp_N - inputs.reference).abs()
    if inputs.has_reference_N is not None:
        gap_N = gap_N * inputs.has_reference_N
    return gap_N.max().double()


class MetricsWriter:
    """Appends to metrics.jsonl and experiment trackers on rank 0; on other ranks it does nothing."""

    def __init__(self, output_dir: Path, *, enabled: bool, start_step: int, trackers: Trackers | None = None):
        self._file = None
        self._trackers = trackers or Trackers()
        if not enabled:
            return
        path = output_dir / "metrics.jsonl"
        _drop_from(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._trackers.log(step, metrics)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._trackers.close()


def _drop_from(path: Path, start_step: int) -> None:
    """Replaces the file without the steps that a resumed run repeats, so that each step is logged exactly once.

    Lines that are not metrics, such as one that a power failure has damaged, are dropped with a warning.
    """
    if path.exists():
        read = JournalReader(path).poll(lambda entry: (int(entry["step"]), entry))
        write_durably(path, b"".join(to_line(entry) for _, (step, entry) in read if step <= start_step))
