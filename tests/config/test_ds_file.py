"""Settings of DeepSpeed files that are refused, and those that depend on the nodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.ds_file import check_results, complete_zero

WHERE = Path("ds.json")


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **settings}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "lr = 2e-06 per step, .* every weight above 0.001 "),
        ({"bfloat16": {"bf16_optimizer_states": True}}, "1 - train.adam_beta2 = 0.001 of its value .* never decrease"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "rounds that away"),
        (zero(zero_quantized_weights=True), "rounded to 8 bits"),
        (zero(zero_quantized_nontrainable_weights=True), "rounded to 8 bits"),
        (zero(zero_quantized_gradients=True), "rounded to 4 bits"),
        (zero(zenflow={}), "gradients of earlier steps"),
        ({"compile": {"deepcompile": True}}, "which bpo does not call"),
        ({"tensor_parallel": {"autotp_size": 2}}, "groups of its own"),
        ({"sequence_parallel_size": 2}, "groups of its own"),
        ({"gradient_allreduce_op": "sum"}, "averages over the ranks"),
    ],
)
def test_what_would_change_the_results_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"ds\.json: `[\w.]+` is not supported: .*{reason}.*; remove it"):
        check_results(settings, WHERE, 2e-6, 0.999)


def test_what_changes_nothing_is_accepted() -> None:
    off = zero(zero_quantized_weights=False, zero_hpz_partition_size=8, offload_param={"device": "none"})
    check_results({**off, "sequence_parallel_size": 1, "bf16": {"enabled": True}}, WHERE, 2e-6, 0.999)


def test_the_arithmetic_of_the_message_is_that_of_bfloat16() -> None:
    """Any weight above 512 steps stays as it is; a second moment at beta2 = 0.999 does not decay."""
    lr = 2e-6
    weights = torch.linspace(512 * lr, 1, 10_000).to(torch.bfloat16)
    assert torch.equal(weights - lr, weights)
    small = torch.tensor(200 * lr, dtype=torch.bfloat16)
    assert small - lr != small
    moments = torch.linspace(1e-12, 1e-6, 1000).to(torch.bfloat16)
    assert torch.equal(moments * 0.999, moments)


@pytest.mark.parametrize(
    ("size", "world_size", "per_node", "expected"),
    [("auto", 16, 8, 8), ("auto", 8, 8, 1), (4, 16, 8, 4), (8, 16, None, 8), ("auto", 1, 1, 1), (8, 8, 8, 1)],
)
def test_groups_of_hpz_are_the_nodes(size: Any, world_size: int, per_node: int | None, expected: int) -> None:
    """One node already has a copy of its own, so that a second one would be useless."""
    given = zero(zero_hpz_partition_size=size)
    completed = complete_zero(given, WHERE, world_size, per_node)
    assert completed["zero_optimization"] == {"stage": 3, "zero_hpz_partition_size": expected}
    assert given == zero(zero_hpz_partition_size=size)


@pytest.mark.parametrize(
    ("size", "world_size", "per_node", "message"),
    [
        (8, 16, 4, "is 8, but a node has 4 ranks and the job 16: groups would cross nodes, .*set it to 4, or to auto"),
        (3, 16, 8, "is 3, but a node has 8 ranks"),
        ("auto", 16, None, "is auto, but the launcher does not say"),
        ("all", 16, 8, "is 'all'; write the number of GPUs per node, or auto"),
    ],
)
def test_groups_across_nodes_are_refused(size: Any, world_size: int, per_node: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"ds.json: zero_hpz_partition_size {message}"):
        complete_zero(zero(zero_hpz_partition_size=size), WHERE, world_size, per_node)


def test_a_path_of_nvme_names_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = zero(offload_param={"device": "nvme", "nvme_path": "$SCRATCH/swap", "buffer_count": 5})
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(ValueError, match=re.escape("offload_param.nvme_path is $SCRATCH/swap; set that variable")):
        complete_zero(given, WHERE, 1, 1)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    with pytest.raises(ValueError, match="swap is not a writable directory; create it on every node"):
        complete_zero(given, WHERE, 1, 1)
    (tmp_path / "swap").mkdir()
    completed = complete_zero(given, WHERE, 1, 1)["zero_optimization"]["offload_param"]
    assert completed == {"device": "nvme", "nvme_path": str(tmp_path / "swap"), "buffer_count": 5}
    assert complete_zero({}, WHERE, 1, 1) == {}
