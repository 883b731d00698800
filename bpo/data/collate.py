"""Packs encoded groups into one row without padding; each prefix appears once.

    [prefix_1 | completion_1a | completion_1b | prefix_2 | completion_2a | ...]

For a model that cannot share prefixes, each completion has its own padded row instead:

    [prefix_1 | completion_1a | padding], [prefix_1 | completion_1b], ...

Shape letters: T packed tokens, B padded rows, N response tokens, P pairs, X position channels (1 or 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from bpo.data.cells import CellPlan, GroupCells, group_pairs, packed_members
from bpo.data.encode import EncodedGroup, EncodedPrompt
from bpo.data.families import Family
from bpo.data.pairs import loss_inputs
from bpo.data.useful_work import useful_work
from bpo.records import GroupBatch, PackedLayout, UsefulWork


class _Sequences:
    """Accumulates the tokens of a batch, its prediction rows and targets, in pieces that are joined at the end."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.prefix_spans: list[tuple[int, int]] = []
        self.completion_spans: list[tuple[tuple[int, int], ...]] = []
        self.rows: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def add(self, group: EncodedGroup, family: Family) -> None:
        prefix_ids_T = _int64(group.prompt.prefix_ids)
        positions = family.prefix_positions(torch.from_numpy(prefix_ids_T), group.prompt.image_inputs).numpy()
        completions = [_int64(ids) for ids in group.completion_ids]
        prefix_span, spans = self._append(prefix_ids_T, positions, completions)
        for start, end in spans:
            # The prefix's last hidden state predicts the first token, each token the next one.
            rows = np.arange(start - 1, end - 1)
            rows[0] = self._last_of_prefix(start, prefix_span)
            self.rows.append(rows)
        self.targets += completions
        self.prefix_spans.append(prefix_span)
        self.completion_spans.append(tuple(spans))

    def _append(
        self, prefix_ids_T: np.ndarray, prefix_positions_XT: np.ndarray, completions: list[np.ndarray]
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Appends ids and positions; returns the spans of the prefix and of its completions."""
        prefix_span = self._append_piece(prefix_ids_T, prefix_positions_XT)
        spans = [self._append_piece(ids, _positions_after(prefix_positions_XT, len(ids))) for ids in completions]
        return prefix_span, spans

    def _append_piece(self, ids_T: np.ndarray, positions_XT: np.ndarray) -> tuple[int, int]:
        start = self.num_tokens
        self.num_tokens += len(ids_T)
        self.ids.append(ids_T)
        self.positions.append(positions_XT)
        return start, self.num_tokens

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
        self, prefix_ids_T: np.ndarray, prefix_positions_XT: np.ndarray, completions: list[np.ndarray]
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        prefix_spans, spans = [], []
        for ids in completions or [_int64(())]:
            prefix_spans.append(self._append_piece(prefix_ids_T, prefix_positions_XT))
            spans.append((self.num_tokens, self.num_tokens + len(ids)))
            self.lengths.append(len(prefix_ids_T) + len(ids))
            rest = np.full(self.row_tokens - len(prefix_ids_T), self.padding_id)
            rest[: len(ids)] = ids
            self._append_piece(rest, _positions_after(prefix_positions_XT, len(rest)))
        return prefix_spans[0], spans if completions else []

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
        row.add(member, family)
    input_ids_T = _joined(row.ids)
    image_inputs, feature_rows_F = _images_of_rows(rows_of, family)
    inputs, group_of_cell = loss_inputs(groups, cells, plan, is_filler=is_filler)
    return GroupBatch(
        group_ids=tuple(group.prompt.record_id for group in groups),
        layout=PackedLayout(tuple(row.prefix_spans), tuple(row.completion_spans)),
        input_ids_T=input_ids_T,
        position_ids_XT=torch.from_numpy(np.concatenate(row.positions, axis=1)),
        image_inputs=image_inputs,
        predictor_rows_N=_joined(row.rows),
        target_N=_joined(row.targets),
        loss_inputs=inputs,
        num_pairs=0 if is_filler else sum(len(group_pairs(group)) for group in groups),
        is_filler=is_filler,
        useful_work=UsefulWork() if is_filler else useful_work(members, family.config),
        reference_keys=tuple(itertools.chain.from_iterable(_in_batch_order(cells, reference_keys))),
        group_of_cell=group_of_cell,
        sequence_inputs=_sequence_inputs(row, input_ids_T, family) if isinstance(row, _PaddedRows) else {},
        feature_rows_F=feature_rows_F,
    )


def _in_batch_order(cells: Sequence[GroupCells], keys: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Keys of packed cells of all groups, then those of virtual cells, as `loss_inputs` numbers them."""
    counts = [len(of_group.cells()) - len(of_group.virtual) for of_group in cells]
    pairs = list(zip(keys, counts, strict=False))
    return [of_group[:count] for of_group, count in pairs] + [of_group[count:] for of_group, count in pairs]


def _int64(ids: Sequence[int]) -> np.ndarray:
    return np.fromiter(ids, np.int64, len(ids))  # in a twentieth of the time of `torch.tensor`


def _joined(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.long)


def _positions_after(prefix_positions_XT: np.ndarray, count: int) -> np.ndarray:
    """[X, count]: every channel continues from the largest position of the prefix."""
    next_position = int(prefix_positions_XT.max()) + 1
    return np.arange(next_position, next_position + count)[None].repeat(len(prefix_positions_XT), axis=0)


def _row_tokens(group: EncodedGroup) -> int:
    """Tokens of the group's longest row: a prefix and, except for a stand-in, a completion."""
    return group.longest_tokens if group.completion_ids else len(group.prompt.prefix_ids)


def _padding_id(family: Family) -> int:
    """The padding token, which nothing attends to: any but the image token, which the model would count."""
    return int(family.image_token_id == 0)


def _sequence_inputs(rows: _PaddedRows, ids_T: torch.Tensor, family: Family) -> dict[str, torch.Tensor]:
    ids_BT = ids_T.reshape(len(rows.lengths), -1)
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
