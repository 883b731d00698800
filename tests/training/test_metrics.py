"""Training metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bpo.config.loss import LossConfig, TermConfig
from bpo.losses.program import LossOutput, LossProgram, Rewards
from bpo.records import GroupBatch, LossInputs, PackedLayout, UsefulWork
from bpo.training.flops import ModelFlops, Products
from bpo.training.hardware import peak_flops
from bpo.training.metrics import MetricsWriter, StepSums, step_metrics, step_rates
from bpo.training.trackers import TensorBoard, Trackers

PROGRAM = LossProgram(LossConfig())
NAMES = (
    "loss preference_loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen "
    "logps/rejected nll/chosen"
).split()


def add(
    sums: StepSums,
    losses: list[float],
    rewards: list[tuple[float, float]],
    is_filler: bool = False,
    work: UsefulWork | None = None,
    weights: list[float] | None = None,
) -> None:
    """Adds a batch of groups of two completions, one token each: completion c has log-prob -c."""
    num_pairs = len(losses)
    spans = tuple(((4 * g + 2, 4 * g + 3), (4 * g + 3, 4 * g + 4)) for g in range(num_pairs))
    logp_N = -torch.arange(2.0 * num_pairs)
    pairs_P2 = torch.arange(2 * num_pairs).reshape(-1, 2)
    batch = GroupBatch(
        group_ids=tuple(f"g{g}" for g in range(num_pairs)),
        layout=PackedLayout(tuple((4 * g, 4 * g + 2) for g in range(num_pairs)), spans),
        input_ids_T=torch.zeros(4 * num_pairs, dtype=torch.long),
        position_ids_XT=torch.zeros(1, 4 * num_pairs, dtype=torch.long),
        image_inputs={},
        predictor_rows_N=torch.zeros(2 * num_pairs, dtype=torch.long),
        target_N=torch.zeros(2 * num_pairs, dtype=torch.long),
        loss_inputs=LossInputs(
            completion_of_token_N=torch.arange(2 * num_pairs),
            completion_starts_K1=torch.arange(2 * num_pairs + 1),
            pairs_P2=pairs_P2,
            pair_weight_P=torch.tensor(weights or [0.0 if is_filler else 1.0] * num_pairs),
            pair_beta_P=torch.ones(num_pairs),
            pairs_of_term=(num_pairs,),
            group_of_pair=tuple(range(num_pairs)),
            reference=logp_N - 0.125,
        ),
        num_pairs=num_pairs,
        is_filler=is_filler,
        useful_work=work or UsefulWork(),
    )
    loss_P, reward_P2 = torch.tensor(losses) * batch.loss_inputs.pair_weight_P, torch.tensor(rewards)
    chosen_logp_P, rejected_logp_P = logp_N[pairs_P2].unbind(1)
    reported = Rewards(
        0, num_pairs, reward_P2[:, 0], reward_P2[:, 1], chosen_logp_P, rejected_logp_P, torch.tensor(losses) / 4
    )
    term_sums_T = torch.stack([loss_P.sum() * share for share in (1.0, 0.5)[: len(sums.terms)]])
    sums.add(LossOutput(loss_P.sum(), term_sums_T, loss_P, reported, {}, {}, logp_N), batch)


def test_means_over_the_pairs_of_all_micro_batches() -> None:
    sums = StepSums.zero(PROGRAM)
    add(sums, [1.0, 3.0], [(0.5, 0.0), (0.25, 0.75)])
    add(sums, [8.0], [(0.75, 0.75)])
    metrics = step_metrics(sums.flat(), PROGRAM)
    assert list(metrics) == NAMES
    assert metrics["loss"] == metrics["preference_loss"] == 4.0 and metrics["nll/chosen"] == 1.0
    assert metrics["rewards/chosen"] == 0.5 and metrics["rewards/rejected"] == 0.5 and metrics["rewards/margins"] == 0
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3)  # a tie is not accurate
    assert metrics["logps/chosen"] == pytest.approx(-2 / 3) and metrics["logps/rejected"] == pytest.approx(-5 / 3)
    assert step_rates(sums.flat(), 1.0) | {"step_seconds": 0} == {
        "pairs_per_second": 3.0,
        "tokens_per_second": 12.0,
        "useful_tokens_per_second": 0.0,
        "step_seconds": 0,
    }
    assert sums.reference_gap == pytest.approx(0.125)


def test_sums_of_ranks_add_up_to_the_metrics_of_the_whole() -> None:
    whole, one, other = StepSums.zero(PROGRAM), StepSums.zero(PROGRAM), StepSums.zero(PROGRAM)
    first, second = ([1.0, 3.0], [(0.5, 0.0), (0.25, 0.75)]), ([8.0], [(1.0, 0.75)])
    for sums, batches in ((whole, [first, second]), (one, [first]), (other, [second])):
        for batch in batches:
            add(sums, *batch)
    reduced = [a + b for a, b in zip(one.flat(), other.flat(), strict=True)]
    assert step_metrics(reduced, PROGRAM) == pytest.approx(step_metrics(whole.flat(), PROGRAM))


def test_weights_count_in_the_losses_only() -> None:
    sums = StepSums.zero(PROGRAM)
    add(sums, [1.0, 3.0], [(0.5, 0.0), (0.25, 0.75)], weights=[0.5, 2.5])
    metrics = step_metrics(sums.flat(), PROGRAM)
    assert metrics["loss"] == metrics["preference_loss"] == 4.0  # 0.5 * 1 + 2.5 * 3 over two pairs
    assert metrics["nll/chosen"] == 0.5 and metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0


def test_each_term_is_reported_under_its_name_before_its_weight() -> None:
    program = LossProgram(LossConfig(terms=[TermConfig(name="mine", weight=0.5), TermConfig(type="nll", weight=3.0)]))
    sums = StepSums.zero(program)
    add(sums, [1.0, 3.0], [(0.5, 0.0), (0.25, 0.75)])  # the second term has half the first one's loss
    metrics = step_metrics(sums.flat(), program)
    assert (metrics["loss/mine"], metrics["loss/nll"]) == (2.0, 1.0)
    assert (metrics["loss"], metrics["preference_loss"]) == (0.5 * 2 + 3 * 1, 1.0)


def test_a_likelihood_alone_has_no_margins() -> None:
    program = LossProgram(LossConfig(type="sft"))
    sums = StepSums.zero(program)
    add(sums, [1.0], [(0.5, 0.0)])
    assert list(step_metrics(sums.flat(), program)) == [
        "loss",
        "preference_loss",
        "rewards/chosen",
        "logps/chosen",
        "nll/chosen",
    ]


def test_fillers_count_nowhere() -> None:
    sums, without = StepSums.zero(PROGRAM), StepSums.zero(PROGRAM)
    for total in (sums, without):
        add(total, [1.0], [(0.5, 0.0)])
    add(sums, [float("nan")], [(9.0, 0.0)], is_filler=True)
    assert sums.flat() == without.flat() and sums == without


class ReadsOfTheDevice(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU: reading values, or results with value-dependent shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once() -> None:
    sums = StepSums.zero(PROGRAM)
    with ReadsOfTheDevice() as reads:
        float(torch.ones(()))
        assert reads.count == 1
        for _ in range(3):
            add(sums, [1.0, 3.0], [(0.5, 0.0), (0.25, 0.75)])
    assert reads.count == 1
    assert step_metrics(sums.flat(), PROGRAM)["loss"] == 2.0


def test_non_finite_losses_name_their_groups_only() -> None:
    sums = StepSums.zero(PROGRAM)
    add(sums, [1.0, float("inf"), float("nan")], [(0.0, 0.0)] * 3)
    sums.flat()
    assert sums.non_finite_groups == ["g1", "g2"]
    assert sums.groups == ["g0", "g1", "g2"]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_writer_appends_a_line_a_step_and_flushes_it(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, enabled=True, start_step=0)
    writer.write(1, {"loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    writer.write(2, {"loss": 0.25})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_resumed_writer_replaces_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "los')
    writer = MetricsWriter(tmp_path, enabled=True, start_step=1)
    writer.write(2, {"loss": 7})
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 7}]


def test_lines_that_are_not_metrics_are_skipped_by_file_and_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad byte, the zeros that a power failure leaves, JSON that is no object of a step."""
    damaged = [b'{"step": 2, "loss": \xff}', b"\0" * 40, b"5", b"{}", b'{"step": null}']
    good = [b'{"step": 1, "loss": 0.1}', b'{"step": 3, "loss": NaN}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *damaged, good[1]]) + b"\n")
    MetricsWriter(tmp_path, enabled=True, start_step=9).close()
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == good
    for number in range(2, 7):
        assert f"metrics.jsonl:{number}: unreadable line, skipped" in caplog.text


def test_a_kill_while_a_resumed_run_shortens_the_file_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = '{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(before)

    def killed(*_: object) -> None:
        assert (tmp_path / "metrics.jsonl").read_text() == before
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, enabled=True, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, enabled=False, start_step=0)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Trackers({"TensorBoard": TensorBoard(tmp_path, 0)})
    writer = MetricsWriter(tmp_path, enabled=True, start_step=0, trackers=board)
    writer.write(1, {"loss": 0.5, "rewards/margins": 2.0})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("rewards/margins")] == [(1, 2.0)]


def test_rates_count_useful_work_only() -> None:
    """Of 12 packed tokens in 2 s, 8 belong to groups; 30 useful FLOPs per token; a peak of 600 FLOP/s."""
    flops = ModelFlops(
        language=Products(5, 5, 5),
        head=Products(),
        projector=Products(),
        vision=Products(),
        attention_width=0,
        vision_width=0,
        vision_window_width=0,
        vision_trained=False,
    )
    sums = StepSums.zero(PROGRAM)
    add(sums, [1.0, 3.0, 8.0], [(0.0, 0.0)] * 3, work=UsefulWork(tokens=8))
    rates = step_rates(sums.flat(), 2.0, flops, 600.0)
    assert rates["tokens_per_second"] == 6 and rates["useful_tokens_per_second"] == 4
    assert rates["model_tflops_per_second"] == 120e-12 and rates["mfu"] == 0.2
    assert "mfu" not in step_rates(sums.flat(), 2.0, flops, None)
    add(sums, [1.0], [(0.0, 0.0)], is_filler=True, work=UsefulWork(tokens=5))
    assert step_rates(sums.flat(), 2.0, flops, 600.0) == rates


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_by_the_name_that_cuda_reports(device: str, tflops: float) -> None:
    assert peak_flops(device) == tflops * 1e12
    assert peak_flops(device, 100.0) == 1e14


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("CPU") is None
    assert peak_flops("CPU", 2.0) == 2e12
