"""The training groups: filters, encodes and measures them, and loads them as packed micro-batches."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from bpo.data.collate import collate_groups, preference_pairs, reference_key
from bpo.data.encode import Dropped, EncodedGroup, EncodedPrompt, Encoder, EncodingError, keep_types
from bpo.formats.images import ImageError, image_bytes_digest
from bpo.records import GroupBatch, PreferenceGroup

# Reasons of `Dropped` that mean bad data, and their codes in `bpo.formats.problems.PROBLEMS`.
BAD_REASONS = {"bad-image": "image-refused", "bad-record": "image-parts"}


@dataclass(frozen=True, slots=True)
class MeasuredGroup:
    """Measurements of a usable group, for the plan and the reference store.

    num_tokens: tokens of the group if its completions share the prefix.
    num_completions, longest_tokens: number of rows as separate sequences, and tokens of the longest.
    """

    num_tokens: int
    num_pairs: int
    reference_key: str
    num_completions: int = 0
    longest_tokens: int = 0


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
        if not group.images and not self.keep_text_only:
            detail = "the group has no image to judge its answers by; set data.text_only=keep to train on it"
            return Dropped(group.id, "no-image", detail)
        longest = max(len(completion.response.split()) for completion in group.completions)
        if longest > self.max_words:
            detail = f"a completion of {longest} words is above data.max_completion_words={self.max_words}"
            return Dropped(group.id, "too-many-words", detail)
        try:
            return self.encoder.encode_group(group)
        except ImageError as error:
            return Dropped(group.id, "bad-image", str(error))
        except EncodingError as error:
            return Dropped(group.id, "bad-record", str(error))

    def measure(self, index: int) -> MeasuredGroup | Dropped:
        encoded = self.encode(index)
        if isinstance(encoded, Dropped):
            return encoded
        digests = [image_bytes_digest(self.encoder.image_root, image) for image in self.groups[index].images]
        return MeasuredGroup(
            num_tokens=encoded.num_tokens,
            num_pairs=len(preference_pairs(encoded.scores)),
            reference_key=reference_key(encoded, digests),
            num_completions=len(encoded.completion_ids),
            longest_tokens=encoded.longest_tokens,
        )

    def measure_all(self, indices: Sequence[int], num_workers: int) -> Iterator[MeasuredGroup | Dropped]:
        """Measures groups in worker processes, in the order of `indices`."""
        loader = DataLoader(
            _Measured(self), batch_size=None, sampler=list(indices), num_workers=num_workers, collate_fn=_same
        )
        return iter(loader)


class _Measured(Dataset):
    def __init__(self, dataset: GroupDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> MeasuredGroup | Dropped:
        return self.dataset.measure(index)


class _MicroBatches(Dataset):
    """One item is one micro-batch, so that worker processes prepare whole batches."""

    def __init__(self, dataset: GroupDataset, keys: dict[int, str], batches: Sequence[tuple[Sequence[int], bool]]):
        self.dataset = dataset
        self.keys = keys
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> GroupBatch:
        indices, is_filler = self.batches[item]
        encoded = []
        for index in indices:
            group = self.dataset.encode(index)
            if isinstance(group, Dropped):
                raise RuntimeError(
                    f"group {group.group_id!r} was usable when the run was planned but no longer is: {group.detail}; "
                    "data must not change during a run"
                )
            encoded.append(group)
        keys = [self.keys[index] for index in indices]
        stand_in = self.dataset.stand_in if not any(group.prompt.image_inputs for group in encoded) else None
        return collate_groups(encoded, self.dataset.encoder.family, keys, is_filler=is_filler, stand_in=stand_in)


def iterate_micro_batches(
    dataset: GroupDataset,
    keys: dict[int, str],
    batches: Sequence[tuple[Sequence[int], bool]],
    *,
    num_workers: int,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[GroupBatch]:
    """Packed micro-batches in order, prepared ahead by worker processes.

    Args:
        batches: `(dataset indices, is_filler)` of each micro-batch.
        keys: Reference key of each dataset index.
        num_workers: Worker processes; 0 prepares each micro-batch on demand.
        prefetch_factor: Micro-batches that each worker prepares ahead.
    """
    loader: DataLoader[Any] = DataLoader(
        _MicroBatches(dataset, keys, batches),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        collate_fn=_same,
        pin_memory=pin_memory,
    )
    return iter(loader)


def _same(item: Any) -> Any:
    return item


def write_dropped(dropped: Sequence[Dropped], path: Path) -> dict[str, int]:
    """Lists dropped groups in a JSONL file; returns their number per reason."""
    counts: dict[str, int] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for group in dropped:
            counts[group.reason] = counts.get(group.reason, 0) + 1
            file.write(json.dumps({"id": group.group_id, "reason": group.reason, "detail": group.detail}) + "\n")
    return counts
