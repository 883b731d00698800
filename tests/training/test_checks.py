"""Fail-fast checks before the first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig
from bpo.training import checks
from bpo.training.checks import FirstStepError, NonFiniteError, check_first_step, check_weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_whatever_rank_has_it(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2, dtype=torch.bfloat16)})
    monkeypatch.setattr(checks, "gather_from_ranks", lambda item: [[], item])
    check_weights(model, "/models/m", 0)
    with torch.no_grad():
        model["b"].weight[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"^/models/m: the model's own weights are not finite: b\.weight; "):
        check_weights(model, "/models/m", 0)


def test_under_zero_3_each_rank_checks_its_own_part_without_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three weights on two ranks: DeepSpeed leaves the fourth place of the second rank uninitialised."""
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_numel = 3
    model.weight.ds_tensor = torch.tensor([1.0, float("nan")])
    monkeypatch.setattr(checks, "gather_from_ranks", lambda item: [item])
    check_weights(model, "m", 1)
    check_weights(model, "m", 2)  # a rank without a part of a small weight
    with pytest.raises(NonFiniteError, match="not finite: weight;"):
        check_weights(model, "m", 0)


def test_dropout_of_a_continued_adapter_does_not_fail_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new adapter's B is zero, so that its dropout has no effect; a continued one differs from its reference."""
    monkeypatch.setattr(checks, "step_metrics", lambda flat, program: {"loss": 0.70})
    monkeypatch.setattr(checks, "gather_from_ranks", lambda item: [item])
    program = SimpleNamespace(needs_reference=True)
    engine: Any = SimpleNamespace(dtype=torch.float32, program=program, sum_over_ranks=lambda values: values)
    sums: Any = SimpleNamespace(expected_first_loss=0.69, num_pairs=1, reference_gap=0.1)

    def check(dropout: float) -> None:
        config = Config(model=ModelConfig(path=str(tmp_path)), lora=LoraConfig(dropout=dropout))
        check_first_step(config, [], sums, engine)

    with pytest.raises(FirstStepError, match="0.700000 but must be 0.690000"):
        check(dropout=0.1)
    (tmp_path / "adapter_config.json").touch()
    check(dropout=0.1)
    with pytest.raises(FirstStepError):
        check(dropout=0.0)


def test_weights_on_a_disk_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves a 0-dimensional tensor in the place of a part that is on NVMe."""
    monkeypatch.setattr(checks, "gather_from_ranks", lambda item: [item])
    model, in_memory = torch.nn.Linear(4, 3, bias=False), []

    class Disk:
        def swap_in(self, parameters: list, async_op: bool) -> None:
            parameters[0].ds_tensor = torch.tensor([1.0, float("nan")])
            in_memory.append(1)

        def remove_partition_and_release_buffers(self, parameters: list) -> None:
            in_memory.pop()

    model.weight.ds_tensor, model.weight.ds_numel, model.weight.nvme_swapper = torch.tensor(1.0), 12, Disk()
    with pytest.raises(NonFiniteError, match="not finite: weight"):
        check_weights(model, "m", 0)
    assert not in_memory
