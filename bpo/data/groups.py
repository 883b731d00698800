"""The training groups: filters, encodes and measures them, and loads them as packed micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bpo.data.cells import AUXILIARY, CellPlan, group_pairs, packed_members
from bpo.data.collate import collate_groups
from bpo.data.encode import Dropped, EncodedGroup, EncodedImages, EncodedPrompt, EncodedView, Encoder, EncodingError
from bpo.data.reference_keys import cell_keys, group_key, keys_by_cell
from bpo.data.views import Views
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

    num_tokens: tokens of the group's cells if those of a view share its prefix.
    num_pairs: preference pairs, whatever the terms of the loss.
    reference_key: key of the group's content.
    num_completions, longest_tokens: number of rows as separate sequences, and tokens of the longest.
    images: size and time of each image file, from `image_identities`.
    cell_keys: keys in the reference store of the cells that the reference scores, one after the other.
    """

    num_tokens: int
    num_pairs: int
    reference_key: str
    num_completions: int = 0
    longest_tokens: int = 0
    images: Sequence[list[int] | None] = ()
    cell_keys: str = ""


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
        plan: CellPlan | None = None,
        image_keys: bool = False,
    ):
        self.image_keys = image_keys  # whether batches have digests of their images
        self.groups = [keep_types(group, types) for group in groups]
        self.encoder = encoder
        self.plan = plan or CellPlan()
        self.views = Views(encoder, self.plan.views, self.plan.seed)
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
            pictures = self.encoder.open_pictures(group.images)
            images = self.encoder.encode_pictures(pictures, group.images)
            views = self._changed_views(group, pictures, images)
            longest = max((len(view.prompt.prefix_ids) for view in views), default=0)
            encoded = self.encoder.encode_group(group, images, longest_prefix=longest)
            if isinstance(encoded, Dropped):
                return encoded
            return dataclasses.replace(encoded, views=(*views, *self._auxiliary(group, images)))
        except ImageError as error:
            return Dropped(group.id, "bad-image", str(error))
        except EncodingError as error:
            return Dropped(group.id, "bad-record", str(error))

    def _changed_views(
        self, group: PreferenceGroup, pictures: list[Image.Image], images: EncodedImages
    ) -> list[EncodedView]:
        names = self.plan.view_names
        if not names:
            return []
        clean = self.encoder.encode_prompt(group.id, images, group.prompt)
        return [EncodedView(name, self.views.prompt(name, group, pictures, images, clean)) for name in names]

    def _cell_keys(self, encoded: EncodedGroup, own: list[str], other: list[str]) -> str:
        """Keys of the cells that the reference scores, from the digests of the group's images and other images."""

        def of_view(name: str) -> str:
            """What a view shows in addition to the group's images: its options, a plug-in's code, other images."""
            code = self.plan.identity if self.views.is_of_plugin(name) else ""
            return self.views.identity(name) + code + "".join(other if self.views.needs_other_images(name) else ())

        return cell_keys(encoded, self.plan.reference_pass().cells(encoded), own, of_view)

    def _auxiliary(self, group: PreferenceGroup, images: EncodedImages) -> list[EncodedView]:
        """A view for each auxiliary prompt, if a term uses them."""
        if not self.plan.uses_auxiliary:
            return []
        if not group.auxiliary:
            raise EncodingError(
                f"record {group.id!r}: the loss has a term over auxiliary prompts, but the record has none; add the "
                'field "auxiliary": [{"prompt": ..., "response": ...}], or remove the term'
            )
        encoded = self.encoder.encode_auxiliary(group, images)
        return [EncodedView(f"{AUXILIARY}{k}", prompt, (ids,)) for k, (prompt, ids) in enumerate(encoded)]

    def _images(self, group: PreferenceGroup) -> tuple[str, ...]:
        """The image files that the group's cells depend on."""
        needs_others = any(self.views.needs_other_images(name) for name in self.plan.view_names)
        return (*group.images, *(group.other_images if needs_others else ()))

    def image_identities(self, index: int) -> list[list[int] | None]:
        """Size and time of each image file that a group's cells depend on."""
        return image_identities(self._images(self.groups[index]), self.encoder.image_root)

    def _digests(self, group: PreferenceGroup) -> list[str]:
        return [image_bytes_digest(self.encoder.image_root, image) for image in self._images(group)]

    def _sizes(self, encoded: EncodedGroup) -> tuple[int, int, int]:
        """Tokens of the group's cells, number of their rows as separate sequences, and tokens of the longest."""
        members = packed_members(encoded, self.plan.cells(encoded))
        rows = sum(len(member.completion_ids) for member in members)
        return sum(m.num_tokens for m in members), rows, max(m.longest_tokens for m in members)

    def measure(self, index: int) -> MeasuredGroup | Dropped:
        group = self.groups[index]
        images = self.image_identities(index)
        encoded = self.encode(index)
        if isinstance(encoded, Dropped):
            return encoded
        digests = self._digests(group)
        if images != self.image_identities(index):
            return Dropped(
                group.id, "bad-image", f"{', '.join(group.images)}: written to while being read; start again"
            )
        num_tokens, num_rows, longest_tokens = self._sizes(encoded)
        return MeasuredGroup(
            num_tokens=num_tokens,
            num_pairs=len(group_pairs(encoded)),
            reference_key=group_key(encoded, digests),
            num_completions=num_rows,
            longest_tokens=longest_tokens,
            images=images,
            cell_keys=self._cell_keys(encoded, digests[: len(group.images)], digests[len(group.images) :]),
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
        num_tokens, num_rows, _ = self._sizes(encoded)
        if num_tokens != measured.num_tokens or num_rows != measured.num_completions:
            detail = f"it has {num_tokens} tokens instead of {measured.num_tokens}: its image or record has changed"
            return Dropped(group.id, "bad-record", detail)
        # After reading: a file that was replaced before or while it was read has another time by now.
        if list(measured.images) != self.image_identities(index):
            try:
                digests = self._digests(group)
            except ImageError as error:
                return Dropped(group.id, "bad-image", str(error))
            if group_key(encoded, digests) != measured.reference_key:
                return Dropped(group.id, "bad-image", changed_images(group))
        return encoded

    def placeholder(self) -> EncodedGroup:
        """A small group that keeps a rank in lockstep where its micro-batch has lost every group of its own."""
        end = self.encoder.eos_token_id
        views = [EncodedView(name, self.stand_in) for name in self.plan.view_names]
        if self.plan.uses_auxiliary:
            views.append(EncodedView(f"{AUXILIARY}0", self.stand_in, ((end,),)))
        return EncodedGroup(self.stand_in, ((end,), (end, end)), (1.0, 0.0), views=tuple(views))

    def collate(
        self, groups: Sequence[EncodedGroup], measured: Sequence[MeasuredGroup], *, for_reference: bool, is_filler: bool
    ) -> GroupBatch:
        """Packs the cells that a step or, with `for_reference`, the reference pass needs."""
        reference = self.plan.reference_pass()
        plan = reference if for_reference else self.plan
        keys = []
        for group, of_group in zip(groups, measured, strict=False):  # a placeholder has no measurement
            key_of = keys_by_cell(reference.cells(group), of_group.cell_keys)
            keys.append([key_of.get(cell, "") for cell in plan.cells(group).cells()])
        members = [member for group in groups for member in packed_members(group, plan.cells(group))]
        stand_in = self.stand_in if not any(member.prompt.image_inputs for member in members) else None
        family = self.encoder.family
        batch = collate_groups(groups, family, plan, keys, is_filler=is_filler, stand_in=stand_in)
        return dataclasses.replace(
            batch,
            group_keys=tuple(of_group.reference_key for of_group in measured),
            image_keys=family.entry_keys(batch.image_inputs) if self.image_keys else (),
        )

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
        for_reference: bool,
    ):
        self.dataset = dataset
        self.measured = measured
        self.batches = batches
        self.for_reference = for_reference

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> GroupBatch:
        indices, is_filler = self.batches[item]
        encoded, kept, lost = [], [], []
        for index in indices:
            measured = self.measured[index]
            if measured is None:
                continue
            group = self.dataset.load(index, measured)
            if isinstance(group, Dropped):
                lost.append(LostGroup(index, group.group_id, group.reason, group.detail))
            else:
                encoded.append(group)
                kept.append(measured)
        if not encoded:
            encoded, is_filler = [self.dataset.placeholder()], True
        batch = self.dataset.collate(encoded, kept, for_reference=self.for_reference, is_filler=is_filler)
        return dataclasses.replace(batch, lost=tuple(lost))


def iterate_micro_batches(
    dataset: GroupDataset,
    measured: Mapping[int, MeasuredGroup | None],
    batches: Sequence[tuple[Sequence[int], bool]],
    *,
    num_workers: int,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    for_reference: bool = False,
) -> Iterator[GroupBatch]:
    """Packed micro-batches in order, prepared ahead by worker processes.

    A group that can no longer be used as it was measured is left out and listed in `GroupBatch.lost`. A micro-batch
    without any group left becomes a filler without reference keys.

    Args:
        batches: `(dataset indices, is_filler)` of each micro-batch.
        measured: Measurement of each dataset index; None leaves the group out.
        num_workers: Worker processes; 0 prepares each micro-batch on demand.
        prefetch_factor: Micro-batches that each worker prepares ahead.
        for_reference: Pack what the reference scores instead of what a step needs.

    Raises:
        ValueError: the limits of this machine are too low for the workers.
    """
    prepare_for_workers(num_workers, prefetch_factor)
    loader: DataLoader[Any] = DataLoader(
        _MicroBatches(dataset, measured, batches, for_reference),
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
