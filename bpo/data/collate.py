"""Packs encoded groups into one row without padding; each prefix appears once.

    [prefix_1 | completion_1a | completion_1b | prefix_2 | completion_2a | ...]

For a model that cannot share prefixes, each completion has its own padded row instead:

    [prefix_1 | completion_1a | padding], [prefix_1 | completion_1b], ...

Shape letters: T packed tokens, B padded rows, N response tokens, P pairs, X position channels (1 or 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from bpo.data.cells import CellPlan, GroupCells, group_pairs, packed_members
from bpo.data.encode import EncodedGroup, EncodedPrompt
from bpo.data.families import Family
from bpo.data.pairs import loss_inputs
from bpo.data.useful_work import useful_work
from bpo.records import GroupBatch, PackedLayout, UsefulWork


class _Sequences:
    """Accumulates the tokens of a batch, its prediction rows and targets."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[torch.Tensor] = []
        self.prefix_spans: list[tuple[int, int]] = []
        self.completion_spans: list[tuple[tuple[int, int], ...]] = []
        self.rows: list[int] = []
        self.targets: list[int] = []

    def add(self, group: EncodedGroup, prefix_positions_XT: torch.Tensor) -> None:
        prefix_span, spans = self._append(group, prefix_positions_XT)
        for (start, end), ids in zip(spans, group.completion_ids, strict=True):
            # The prefix's last hidden state predicts the first token, each token the next one.
            self.rows.extend([self._last_of_prefix(start, prefix_span), *range(start, end - 1)])
            self.targets.extend(ids)
        self.prefix_spans.append(prefix_span)
        self.completion_spans.append(tuple(spans))

    def _append(
        self, group: EncodedGroup, prefix_positions_XT: torch.Tensor
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Appends ids and positions; returns the spans of the prefix and of its completions."""
        start = len(self.ids)
        self.ids.extend(group.prompt.prefix_ids)
        prefix_span = (start, len(self.ids))
        self.positions.append(prefix_positions_XT)
        spans = []
        for completion_ids in group.completion_ids:
            spans.append((len(self.ids), len(self.ids) + len(completion_ids)))
            self.ids.extend(completion_ids)
            self.positions.append(_positions_after(prefix_positions_XT, len(completion_ids)))
        return prefix_span, spans

    def _last_of_prefix(self, completion_start: int, prefix_span: tuple[int, int]) -> int:
        return prefix_span[1] - 1


class _PaddedRows(_Sequences):
    """Concatenated rows of [prefix | completion | padding], all of the same length.

    Padding is on the right: under a causal mask no earlier token attends to it.
    """

    def __init__(self, row_tokens: int, padding_id: int):
        super().__init__()
        self.row_tokens = row_tokens
        self.padding_id = padding_id
        self.lengths: list[int] = []

    def _append(
        self, group: EncodedGroup, prefix_positions_XT: torch.Tensor
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        first = len(self.ids)
        prefix_length = len(group.prompt.prefix_ids)
        spans = []
        for completion_ids in group.completion_ids or [()]:
            start = len(self.ids) + prefix_length
            spans.append((start, start + len(completion_ids)))
            length = prefix_length + len(completion_ids)
            padding = self.row_tokens - length
            self.ids.extend([*group.prompt.prefix_ids, *completion_ids, *[self.padding_id] * padding])
            self.positions += [
                prefix_positions_XT,
                _positions_after(prefix_positions_XT, len(completion_ids) + padding),
            ]
            self.lengths.append(length)
        return (first, first + prefix_length), spans if group.completion_ids else []

    def _last_of_prefix(self, completion_start: int, prefix_span: tuple[int, int]) -> int:
        return completion_start - 1

    def attention_mask(self) -> torch.Tensor:
        """[B, T / B]: 1 for tokens, 0 for padding."""
        return (torch.arange(self.row_tokens) < torch.tensor(self.lengths)[:, None]).long()


def collate_groups(
    groups: Sequence[EncodedGroup],
    family: Family,
    plan: CellPlan | None = None,
    reference_keys: Sequence[Sequence[str]] = (),
    *,
    is_filler: bool = False,
    stand_in: EncodedPrompt | None = None,
) -> GroupBatch:
    """Packs groups into a `GroupBatch`, or gives each completion its own row if `family` cannot share prefixes.

    Positions continue after the prefix for each completion, so it is encoded as if it were the only completion of its
    prompt. With `is_filler` every pair has weight 0.

    Groups without any image end with the `stand_in` image: a prefix that no completion follows or attends to. Vision
    tower and projector then run in every micro-batch, as ZeRO's collectives require if another rank has images; no row
    of the loss depends on the stand-in, so its gradient is exactly zero.

    Args:
        plan: Terms of the loss, which select the cells; None for all completions and pairs on the clean images.
        reference_keys: Of each group, the key of each of its cells.
    """
    plan = plan or CellPlan(every_completion=True)
    cells = [plan.cells(group) for group in groups]
    members = [
        member for group, of_group in zip(groups, cells, strict=True) for member in packed_members(group, of_group)
    ]
    rows_of = members if stand_in is None else [*members, EncodedGroup(stand_in, (), ())]
    shares = family.separate_reason is None
    row = _Sequences() if shares else _PaddedRows(max(_row_tokens(member) for member in rows_of), _padding_id(family))
    for member in rows_of:
        row.add(member, _positions(member.prompt, family))
    image_inputs, feature_rows_F = _images_of_rows(rows_of, family)
    inputs, group_of_cell = loss_inputs(groups, cells, plan, is_filler=is_filler)
    return GroupBatch(
        group_ids=tuple(group.prompt.record_id for group in groups),
        layout=PackedLayout(tuple(row.prefix_spans), tuple(row.completion_spans)),
        input_ids_T=torch.tensor(row.ids, dtype=torch.long),
        position_ids_XT=torch.cat(row.positions, dim=1),
        image_inputs=image_inputs,
        predictor_rows_N=torch.tensor(row.rows, dtype=torch.long),
        target_N=torch.tensor(row.targets, dtype=torch.long),
        loss_inputs=inputs,
        num_pairs=0 if is_filler else sum(len(group_pairs(group)) for group in groups),
        is_filler=is_filler,
        useful_work=UsefulWork() if is_filler else useful_work(members, family.config),
        reference_keys=tuple(itertools.chain.from_iterable(_in_batch_order(cells, reference_keys))),
        group_of_cell=group_of_cell,
        sequence_inputs=_sequence_inputs(row, family) if isinstance(row, _PaddedRows) else {},
        feature_rows_F=feature_rows_F,
    )


def _in_batch_order(cells: Sequence[GroupCells], keys: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Keys of packed cells of all groups, then those of virtual cells, as `loss_inputs` numbers them."""
    counts = [len(of_group.cells()) - len(of_group.virtual) for of_group in cells]
    pairs = list(zip(keys, counts, strict=False))
    return [of_group[:count] for of_group, count in pairs] + [of_group[count:] for of_group, count in pairs]


def _positions(prompt: EncodedPrompt, family: Family) -> torch.Tensor:
    return family.prefix_positions(torch.tensor(prompt.prefix_ids, dtype=torch.long), prompt.image_inputs)


def _positions_after(prefix_positions_XT: torch.Tensor, count: int) -> torch.Tensor:
    """[X, count]: every channel continues from the largest position of the prefix."""
    next_position = int(prefix_positions_XT.max()) + 1
    return (torch.arange(count) + next_position).expand(prefix_positions_XT.shape[0], -1)


def _row_tokens(group: EncodedGroup) -> int:
    """Tokens of the group's longest row: a prefix and, except for a stand-in, a completion."""
    return group.longest_tokens if group.completion_ids else len(group.prompt.prefix_ids)


def _padding_id(family: Family) -> int:
    """The padding token, which nothing attends to: any but the image token, which the model would count."""
    return int(family.image_token_id == 0)


def _sequence_inputs(rows: _PaddedRows, family: Family) -> dict[str, torch.Tensor]:
    ids_BT = torch.tensor(rows.ids, dtype=torch.long).reshape(len(rows.lengths), -1)
    return {"attention_mask": rows.attention_mask(), **family.sequence_inputs(ids_BT)}


def _images_of_rows(
    groups: Sequence[EncodedGroup], family: Family
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The model's image inputs and, for separate sequences, the index of the images of each row.

    Every row of a group contains its images. If the family allows it, pixels are passed once and `feature_rows_F`
    repeats their features; otherwise the pixels themselves are repeated.
    """
    with_images = [group for group in groups if group.prompt.image_inputs]
    inputs = [group.prompt.image_inputs for group in with_images]
    if family.separate_reason is None:
        return family.batch_image_inputs(inputs), None
    repeats = [max(1, len(group.completion_ids)) for group in with_images]
    if not (family.repeats_features and inputs):
        return family.batch_image_inputs([x for x, n in zip(inputs, repeats, strict=True) for _ in range(n)]), None
    pixels = [x["pixel_values"] for x in inputs]
    others = [{key: x[key] for key in x if key != "pixel_values"} for x in inputs]
    ends = [0, *itertools.accumulate(len(values) for values in pixels)]
    tiles = zip(itertools.pairwise(ends), repeats, strict=True)
    return (
        family.batch_image_inputs([x for x, n in zip(others, repeats, strict=True) for _ in range(n)])
        | {"pixel_values": torch.cat(pixels)},
        torch.tensor([tile for (start, end), n in tiles for _ in range(n) for tile in range(start, end)]),
    )
