"""The training groups: filters, encodes and measures them, and loads them as packed micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from bpo.data.collate import collate_groups, preference_pairs, reference_key
from bpo.data.encode import Dropped, EncodedGroup, EncodedPrompt, Encoder, EncodingError
from bpo.formats.images import ImageError, image_bytes_digest, image_identities
from bpo.formats.usable import keep_types, refusal
from bpo.job.durable import replacing
from bpo.job.journal import to_line
from bpo.job.process import prepare_for_workers
from bpo.job.signals import leave_signals_to_parent
from bpo.records import GroupBatch, LostGroup, PreferenceGroup

# Reasons of `Dropped` that mean bad data, and their codes in `bpo.formats.problems.PROBLEMS`.
BAD_REASONS = {"bad-image": "image-refused", "bad-record": "image-parts"}


@dataclass(frozen=True, slots=True)
class MeasuredGroup:
    """Measurements of a usable group, for the plan and the reference store.

    num_tokens: tokens of the group if its completions share the prefix.
    num_completions, longest_tokens: number of rows as separate sequences, and tokens of the longest.
    images: size and time of each image file, from `image_identities`.
    """

    num_tokens: int
    num_pairs: int
    reference_key: str
    num_completions: int = 0
    longest_tokens: int = 0
    images: Sequence[list[int] | None] = ()


class GroupDataset(Dataset):
    """Preference groups, encoded on access; `measure` determines whether a group can be used."""

    def __init__(
        self,
        groups: Sequence[PreferenceGroup],
        encoder: Encoder,
        *,
        max_words: int,
        types: Sequence[str],
        keep_text_only: bool = False,
    ):
        self.groups = [keep_types(group, types) for group in groups]
        self.encoder = encoder
        self.max_words = max_words
        self.keep_text_only = keep_text_only

    @functools.cached_property
    def stand_in(self) -> EncodedPrompt:
        return self.encoder.stand_in()

    def __len__(self) -> int:
        return len(self.groups)

    def encode(self, index: int) -> EncodedGroup | Dropped:
        """Encodes one group; a broken image or record becomes `Dropped` with the error as its detail."""
        group = self.groups[index]
        refused = refusal(group, max_words=self.max_words, keep_text_only=self.keep_text_only)
        if refused is not None:
            return Dropped(group.id, *refused)
        try:
            return self.encoder.encode_group(group)
        except ImageError as error:
            return Dropped(group.id, "bad-image", str(error))
        except EncodingError as error:
            return Dropped(group.id, "bad-record", str(error))

    def measure(self, index: int) -> MeasuredGroup | Dropped:
        group = self.groups[index]
        images = image_identities(group.images, self.encoder.image_root)
        encoded = self.encode(index)
        if isinstance(encoded, Dropped):
            return encoded
        digests = [image_bytes_digest(self.encoder.image_root, image) for image in group.images]
        if images != image_identities(group.images, self.encoder.image_root):
            return Dropped(
                group.id, "bad-image", f"{', '.join(group.images)}: written to while being read; start again"
            )
        return MeasuredGroup(
            num_tokens=encoded.num_tokens,
            num_pairs=len(preference_pairs(encoded.scores)),
            reference_key=reference_key(encoded, digests),
            num_completions=len(encoded.completion_ids),
            longest_tokens=encoded.longest_tokens,
            images=images,
        )

    def load(self, index: int, measured: MeasuredGroup) -> EncodedGroup | Dropped:
        """Encodes one group for a step, and compares it with its measurement, to which plan and reference belong.

        The content of an image is compared only if its size or time has changed. Content that was replaced in place
        *with* the old size and time is therefore not detected.
        """
        group = self.groups[index]
        encoded = self.encode(index)
        if isinstance(encoded, Dropped):
            return encoded
        if encoded.num_tokens != measured.num_tokens or len(encoded.completion_ids) != measured.num_completions:
            detail = (
                f"it has {encoded.num_tokens} tokens instead of {measured.num_tokens}: its image or record has changed"
            )
            return Dropped(group.id, "bad-record", detail)
        # After reading: a file that was replaced before or while it was read has another time by now.
        if list(measured.images) != image_identities(group.images, self.encoder.image_root):
            try:
                digests = [image_bytes_digest(self.encoder.image_root, image) for image in group.images]
            except ImageError as error:
                return Dropped(group.id, "bad-image", str(error))
            if reference_key(encoded, digests) != measured.reference_key:
                return Dropped(group.id, "bad-image", changed_images(group))
        return encoded

    def placeholder(self) -> EncodedGroup:
        """A small group that keeps a rank in lockstep where its micro-batch has lost every group of its own."""
        end = self.encoder.eos_token_id
        return EncodedGroup(self.stand_in, ((end,), (end, end)), (1.0, 0.0))

    def measure_all(self, indices: Sequence[int], num_workers: int) -> Iterator[MeasuredGroup | Dropped]:
        """Measures groups in worker processes, in the order of `indices`."""
        prepare_for_workers(num_workers, prefetch_factor=2)
        loader = DataLoader(
            _Measured(self),
            batch_size=None,
            sampler=list(indices),
            num_workers=num_workers,
            collate_fn=_same,
            worker_init_fn=leave_signals_to_parent,
        )
        return iter(loader)


def changed_images(group: PreferenceGroup) -> str:
    return f"the content of {', '.join(group.images)} has changed since the run was planned"


class _Measured(Dataset):
    def __init__(self, dataset: GroupDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> MeasuredGroup | Dropped:
        return self.dataset.measure(index)


class _MicroBatches(Dataset):
    """One item is one micro-batch, so that worker processes prepare whole batches."""

    def __init__(
        self,
        dataset: GroupDataset,
        measured: Mapping[int, MeasuredGroup | None],
        batches: Sequence[tuple[Sequence[int], bool]],
    ):
        self.dataset = dataset
        self.measured = measured
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> GroupBatch:
        indices, is_filler = self.batches[item]
        encoded, keys, lost = [], [], []
        for index in indices:
            measured = self.measured[index]
            if measured is None:
                continue
            group = self.dataset.load(index, measured)
            if isinstance(group, Dropped):
                lost.append(LostGroup(index, group.group_id, group.reason, group.detail))
            else:
                encoded.append(group)
                keys.append(measured.reference_key)
        if not encoded:
            encoded, is_filler = [self.dataset.placeholder()], True
        stand_in = self.dataset.stand_in if not any(group.prompt.image_inputs for group in encoded) else None
        batch = collate_groups(encoded, self.dataset.encoder.family, keys, is_filler=is_filler, stand_in=stand_in)
        return dataclasses.replace(batch, lost=tuple(lost))


def iterate_micro_batches(
    dataset: GroupDataset,
    measured: Mapping[int, MeasuredGroup | None],
    batches: Sequence[tuple[Sequence[int], bool]],
    *,
    num_workers: int,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[GroupBatch]:
    """Packed micro-batches in order, prepared ahead by worker processes.

    A group that can no longer be used as it was measured is left out and listed in `GroupBatch.lost`. A micro-batch
    without any group left becomes a filler without reference keys.

    Args:
        batches: `(dataset indices, is_filler)` of each micro-batch.
        measured: Measurement of each dataset index; None leaves the group out.
        num_workers: Worker processes; 0 prepares each micro-batch on demand.
        prefetch_factor: Micro-batches that each worker prepares ahead.

    Raises:
        ValueError: the limits of this machine are too low for the workers.
    """
    prepare_for_workers(num_workers, prefetch_factor)
    loader: DataLoader[Any] = DataLoader(
        _MicroBatches(dataset, measured, batches),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        collate_fn=_same,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent,
    )
    return iter(loader)


def _same(item: Any) -> Any:
    return item


def write_dropped(dropped: Sequence[Dropped], path: Path) -> dict[str, int]:
    """Lists dropped groups in a JSONL file; returns their number per reason."""
    counts: dict[str, int] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as file:
        for group in dropped:
            counts[group.reason] = counts.get(group.reason, 0) + 1
            file.write(to_line({"id": group.group_id, "reason": group.reason, "detail": group.detail}))
    return counts
