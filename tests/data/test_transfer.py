"""Transfer of micro-batches to the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bpo.data.transfer import on_device, one_ahead
from bpo.records import GroupBatch
from tests.sample_groups import encoder_of, packed_batch, three_groups

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def batch(request: pytest.FixtureRequest, photo_root) -> GroupBatch:
    encoder = encoder_of(request.getfixturevalue(f"tiny_{request.param}_dir"), photo_root)
    return packed_batch(encoder, three_groups()).with_reference(torch.arange(3.0))


def test_moving_changes_only_the_dtype_of_pixels(batch: GroupBatch) -> None:
    moved = batch.to(torch.device("meta"), torch.bfloat16)
    assert all(tensor.is_meta for tensor in moved.tensors()) and len(moved.tensors()) == len(batch.tensors()) > 9
    for name, value in batch.image_inputs.items():
        assert moved.image_inputs[name].dtype == (torch.bfloat16 if name == "pixel_values" else value.dtype)
    assert moved.loss_inputs.reference is not None and moved.loss_inputs.reference.dtype == torch.float32
    assert moved.layout is batch.layout and moved.group_ids == batch.group_ids


def test_tensors_already_on_the_device_are_not_copied(batch: GroupBatch) -> None:
    again = batch.to(CPU, torch.float32)
    assert [a.data_ptr() for a in again.tensors()] == [b.data_ptr() for b in batch.tensors()]


def test_without_a_gpu_batches_are_taken_only_on_demand(batch: GroupBatch) -> None:
    taken: list[int] = []

    def source() -> Iterator[GroupBatch]:
        for k in range(3):
            taken.append(k)
            yield batch

    on_cpu = on_device(source(), CPU, torch.float32)
    next(on_cpu)
    assert taken == [0]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_next_copy_starts_before_the_current_batch_is_returned(count: int) -> None:
    events: list[str] = []

    def start(item: int) -> int:
        events.append(f"start {item}")
        return item

    def finish(item: int) -> int:
        events.append(f"finish {item}")
        return item

    for item in one_ahead(iter(range(count)), start, finish):
        events.append(f"compute {item}")
    assert [e for e in events if e.startswith("compute")] == [f"compute {k}" for k in range(count)]
    for k in range(count):
        order = [events.index(f"{what} {k}") for what in ("start", "finish", "compute")]
        assert order == sorted(order)
        if k + 1 < count:
            assert events.index(f"start {k + 1}") < events.index(f"compute {k}")
        if k + 2 < count:  # at most one ahead, to limit device memory
            assert events.index(f"start {k + 2}") > events.index(f"compute {k}")
