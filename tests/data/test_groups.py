"""Training groups: measuring, filtering, batching."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bpo.config.loss import ViewConfig
from bpo.data.cells import CellPlan, TermSpec
from bpo.data.encode import Dropped, Encoder
from bpo.data.groups import GroupDataset, MeasuredGroup, iterate_micro_batches, write_dropped
from bpo.data.reference_keys import split_keys
from bpo.records import PreferenceGroup
from tests.sample_groups import encode_all, encoder_of, group, three_groups, turn, write_photos


@pytest.fixture
def encoder(tiny_llava_dir: Path, tmp_path: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, write_photos(tmp_path))


def dataset_of(encoder: Encoder, *groups: PreferenceGroup, max_words: int = 350, types: tuple[str, ...] = ()):
    return GroupDataset(groups, encoder, max_words=max_words, types=types)


def reasons(dataset: GroupDataset) -> dict[str, str]:
    measured = [dataset.measure(i) for i in range(len(dataset))]
    return {outcome.group_id: outcome.reason for outcome in measured if isinstance(outcome, Dropped)}


def test_measured_length_and_pairs_match_the_encoded_group(encoder: Encoder) -> None:
    groups = three_groups()
    measured = list(dataset_of(encoder, *groups).measure_all(range(3), num_workers=0))
    assert [(m.num_tokens, m.num_pairs) for m in measured] == [
        (encoded.num_tokens, pairs) for encoded, pairs in zip(encode_all(encoder, groups), (2, 1, 1), strict=True)
    ]


def test_worker_processes_give_the_same_results(encoder: Encoder) -> None:
    dataset = dataset_of(encoder, *three_groups())
    here = list(dataset.measure_all([2, 0, 1], num_workers=0))
    assert list(dataset.measure_all([2, 0, 1], num_workers=1)) == here
    measured = dict(zip([2, 0, 1], here, strict=True))
    plan = [([0, 2], False), ([1], False), ([1], True)]
    first, second, filler = iterate_micro_batches(dataset, measured, plan, num_workers=1)
    assert first.group_ids == ("a", "c") and second.group_ids == filler.group_ids == ("b",)
    assert first.group_keys == (measured[0].reference_key, measured[2].reference_key)
    assert list(first.reference_keys) == split_keys(measured[0].cell_keys) + split_keys(measured[2].cell_keys)
    assert second.loss_inputs.pair_weight_P.tolist() == [1.0] and filler.loss_inputs.pair_weight_P.tolist() == [0.0]
    again, *_ = iterate_micro_batches(dataset, measured, plan, num_workers=0)
    assert torch.equal(first.input_ids_T, again.input_ids_T)
    assert torch.equal(first.image_inputs["pixel_values"], again.image_inputs["pixel_values"])


def test_unusable_groups_are_dropped_with_a_reason(encoder: Encoder) -> None:
    (encoder.image_root / "broken.png").write_bytes(b"not a picture")
    no_image = PreferenceGroup("no-image", (), (turn("What?"),), group("x", "a", "b").completions)
    two_for_one = replace(group("count", "a", "b"), images=("wide.png", "tall.png"))
    dataset = dataset_of(
        encoder,
        group("good", "a cat", "a dog"),
        no_image,
        group("broken", "a", "b", image="broken.png"),
        group("missing", "a", "b", image="nowhere.png"),
        two_for_one,
        group("long", "w " * 6, "b"),
        group("same", "a", "a"),
        max_words=5,
    )
    assert reasons(dataset) == {
        "no-image": "no-image",
        "broken": "bad-image",
        "missing": "bad-image",
        "count": "bad-record",
        "long": "too-many-words",
        "same": "no-pair",
    }
    details = {d.group_id: d.detail for d in map(dataset.measure, range(1, 7)) if isinstance(d, Dropped)}
    assert "broken.png" in details["broken"] and "nowhere.png" in details["missing"]
    assert "data.max_completion_words=5" in details["long"]


def text_only(name: str = "text-only") -> PreferenceGroup:
    return PreferenceGroup(name, (), (turn("What?"),), group("x", "one and two", "three").completions)


def test_groups_without_an_image_are_kept_if_requested(encoder: Encoder) -> None:
    dataset = GroupDataset([text_only(), *three_groups()], encoder, max_words=350, types=(), keep_text_only=True)
    measured = [dataset.measure(i) for i in range(4)]
    assert all(isinstance(m, MeasuredGroup) for m in measured)
    by_index = dict(enumerate(measured))
    alone, mixed = iterate_micro_batches(dataset, by_index, [([0], False), ([0, 1], False)], num_workers=0)
    # A batch without images gets a stand-in image, so that the vision tower runs on every rank.
    assert alone.image_inputs["pixel_values"].shape[0] == mixed.image_inputs["pixel_values"].shape[0] == 1
    assert len(alone.layout.prefix_spans) == 2 and alone.layout.completion_spans[1] == ()
    assert len(mixed.layout.prefix_spans) == 2 and all(mixed.layout.completion_spans)
    assert alone.group_ids == ("text-only",) and mixed.group_ids == ("text-only", "a")
    assert alone.input_ids_T.numel() == measured[0].num_tokens + len(dataset.stand_in.prefix_ids)  # type: ignore[union-attr]


class LoggingDataset(GroupDataset):
    """Appends a byte to a file for every group encoded by any process."""

    log: Path

    def encode(self, index: int):
        with self.log.open("ab") as file:
            file.write(b".")
        return super().encode(index)


@pytest.mark.parametrize("prefetch_factor", [1, 4])
def test_prefetch_factor_micro_batches_are_prepared_ahead(encoder: Encoder, tmp_path: Path, prefetch_factor) -> None:
    dataset = LoggingDataset(three_groups(), encoder, max_words=350, types=())
    dataset.log = tmp_path / "encoded"
    plan = [([i % 3], False) for i in range(8)]
    measured = {index: dataset.measure(index) for index in range(3)}
    dataset.log.unlink()
    batches = iterate_micro_batches(dataset, measured, plan, num_workers=1, prefetch_factor=prefetch_factor)
    next(batches)
    deadline = time.monotonic() + 60
    while dataset.log.stat().st_size < 1 + prefetch_factor and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # enough time to prepare more than requested
    assert dataset.log.stat().st_size == 1 + prefetch_factor
    assert len(list(batches)) == 7


def test_groups_left_without_a_pair_by_type_are_dropped(encoder: Encoder) -> None:
    only_weakened = dataset_of(encoder, group("g", "a", "b"), types=("llm-hal",))
    assert reasons(only_weakened) == {"g": "no-pair"}


def test_pairs_of_weight_0_are_left_out_before_planning(encoder: Encoder) -> None:
    original = group("g", "a cat", "a dog", "two dogs")

    def weighted(*weights: float) -> PreferenceGroup:
        pairs = zip(original.completions, weights, strict=True)
        return replace(original, completions=tuple(replace(c, weight=w) for c, w in pairs))

    dataset = dataset_of(encoder, weighted(1, 0, 0.5), group("g", "a cat", "two dogs"), max_words=2)
    some, without = dataset.measure(0), dataset.measure(1)
    assert isinstance(some, MeasuredGroup) and some == without
    assert reasons(dataset_of(encoder, weighted(1, 0, 0), weighted(0, 0, 0))) == {"g": "no-pair"}


def test_reference_key_follows_the_bytes_of_the_image(encoder: Encoder) -> None:
    dataset = dataset_of(encoder, group("g", "a", "b"), group("h", "a", "b"))
    before, same = dataset.measure(0), dataset.measure(1)
    assert isinstance(before, MeasuredGroup) and before == same
    Image.new("RGB", (90, 60), "red").save(encoder.image_root / "wide.png")
    after = dataset.measure(0)
    assert isinstance(after, MeasuredGroup)
    assert after.reference_key != before.reference_key and after.num_tokens == before.num_tokens


@pytest.mark.parametrize("change", ["deleted", "truncated", "replaced", "other size", "touched"])
def test_an_image_that_changes_after_measuring_loses_its_group_and_no_other(encoder: Encoder, change: str) -> None:
    dataset = dataset_of(encoder, group("g", "a", "b"), group("h", "a", "b", image="tall.png"))
    measured = {index: dataset.measure(index) for index in range(2)}
    image = encoder.image_root / "wide.png"
    if change == "deleted":
        image.unlink()
    elif change == "truncated":
        image.write_bytes(image.read_bytes()[:-40])
    elif change == "touched":
        os.utime(image)
    else:
        Image.new("RGB", (90, 60) if change == "replaced" else (9, 6), "red").save(image)
    alone, both = iterate_micro_batches(dataset, measured, [([0], False), ([0, 1], False)], num_workers=0)
    if change == "touched":  # the content is what it was
        assert not alone.lost and both.group_ids == ("g", "h")
        return
    assert both.group_ids == ("h",) and both.group_keys == (measured[1].reference_key,)
    assert alone.is_filler and alone.group_keys == () and not alone.loss_inputs.pair_weight_P.any()
    assert alone.image_inputs["pixel_values"].shape[0] == 1  # the vision tower runs, as on the other ranks
    (lost,) = alone.lost
    assert (lost.index, lost.group_id, lost.reason) == (0, "g", "bad-image") and "wide.png" in lost.detail


def test_an_image_that_gives_other_tokens_than_planned_loses_its_group(encoder: Encoder) -> None:
    """Of a family whose number of image tokens depends on the image, or with another processor than was planned."""
    dataset = dataset_of(encoder, group("g", "a", "b"))
    measured = replace(dataset.measure(0), num_tokens=7)  # type: ignore[type-var]
    (batch,) = iterate_micro_batches(dataset, {0: measured}, [([0], False)], num_workers=0)
    assert batch.lost[0].reason == "bad-record" and "tokens instead of 7" in batch.lost[0].detail


def test_dropped_groups_are_listed_and_counted(tmp_path: Path) -> None:
    dropped = [Dropped("a", "no-pair", "x"), Dropped("b", "bad-image", "ü"), Dropped("c", "no-pair", "y")]
    assert write_dropped(dropped, tmp_path / "new" / "dropped.jsonl") == {"no-pair": 2, "bad-image": 1}
    lines = [json.loads(line) for line in (tmp_path / "new" / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert lines[1] == {"id": "b", "reason": "bad-image", "detail": "ü"}


def test_cells_of_the_clean_image_are_the_same_entries_for_every_loss(encoder: Encoder) -> None:
    """A store of DPO serves SymMPO's text term, and a plug-in's views alone depend on its code."""
    groups = [replace(three_groups()[0], other_images=three_groups()[2].images)]
    plain = GroupDataset(groups, encoder, max_words=99, types=()).measure(0)
    views = {"other": ViewConfig(type="other"), "crop": ViewConfig(type="crop")}
    terms = (TermSpec(), TermSpec(pairs="image", against="other"), TermSpec(pairs="image", against="crop"))
    keys = []
    for identity, other in (("", 2), ("code", 2), ("", 1)):
        changed = [replace(groups[0], other_images=three_groups()[other].images[:1])]
        plan = CellPlan(terms, views, identity=identity)
        measured = GroupDataset(changed, encoder, max_words=99, types=(), plan=plan).measure(0)
        assert isinstance(measured, MeasuredGroup) and isinstance(plain, MeasuredGroup)
        keys.append(split_keys(measured.cell_keys))
        assert set(split_keys(plain.cell_keys)) < set(keys[-1])
    assert keys[0] == keys[1]
    assert len(set(keys[0]) - set(keys[2])) == 1  # the cell under the other image


def test_a_batch_of_cells_without_images_ends_with_the_stand_in(encoder: Encoder) -> None:
    """Another rank's placeholder has an image: the vision tower must run here too, as ZeRO's collectives require."""
    plan = CellPlan((TermSpec(view="blind"),), {"blind": ViewConfig(type="none")})
    dataset = GroupDataset(three_groups()[:1], encoder, max_words=99, types=(), plan=plan)
    measured = dataset.measure(0)
    assert isinstance(measured, MeasuredGroup)
    (batch,) = iterate_micro_batches(dataset, {0: measured}, [([0], False)], num_workers=0)
    assert len(batch.layout.prefix_spans) == 2 and batch.layout.completion_spans[-1] == ()
    assert batch.image_inputs["pixel_values"].shape[0] == 1
