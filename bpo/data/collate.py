"""Packs encoded groups into one row without padding; each prefix stands once.

    [prefix_1 | completion_1a | completion_1b | prefix_2 | completion_2a | ...]

Shape letters: T packed tokens, N response tokens, P pairs, X position channels (1 or 3).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence

import torch

from bpo.data.encode import EncodedGroup, EncodedPrompt
from bpo.data.families import Family
from bpo.records import GroupBatch, PackedLayout


def preference_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with score_i > score_j, in order."""
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def reference_key(group: EncodedGroup, image_digests: Sequence[str]) -> str:
    """Content address of a group's log-probs: image bytes and token ids, so that a changed record is computed anew."""
    content = [list(image_digests), list(group.prompt.prefix_ids), [list(ids) for ids in group.completion_ids]]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


class _Row:
    """The packed row while it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[torch.Tensor] = []
        self.prefix_spans: list[tuple[int, int]] = []
        self.completion_spans: list[tuple[tuple[int, int], ...]] = []
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.completion_of_token: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.num_completions = 0

    def add(self, group: EncodedGroup, prefix_positions_XT: torch.Tensor) -> None:
        prefix_start = len(self.ids)
        self.ids.extend(group.prompt.prefix_ids)
        prefix_end = len(self.ids)
        self.prefix_spans.append((prefix_start, prefix_end))
        self.positions.append(prefix_positions_XT)
        next_position = int(prefix_positions_XT.max()) + 1
        spans = []
        for completion_ids in group.completion_ids:
            start = len(self.ids)
            self.ids.extend(completion_ids)
            spans.append((start, len(self.ids)))
            self.positions.append(
                (torch.arange(len(completion_ids)) + next_position).expand(prefix_positions_XT.shape[0], -1)
            )
            # The prefix's last hidden state predicts the first token, each token its successor.
            self.rows.extend([prefix_end - 1, *range(start, len(self.ids) - 1)])
            self.targets.extend(completion_ids)
            self.completion_of_token.extend([self.num_completions + len(spans) - 1] * len(completion_ids))
        self.completion_spans.append(tuple(spans))
        offset = self.num_completions
        self.pairs.extend((offset + i, offset + j) for i, j in preference_pairs(group.scores))
        self.num_completions += len(spans)


def collate_groups(
    groups: Sequence[EncodedGroup],
    family: Family,
    reference_keys: Sequence[str] = (),
    *,
    is_filler: bool = False,
    stand_in: EncodedPrompt | None = None,
) -> GroupBatch:
    """Packs groups into a `GroupBatch`.

    Positions go on after the prefix for each completion, so a completion is encoded as if it stood alone after its
    prompt. With `is_filler` every pair has weight 0.

    Groups without any image end in the `stand_in` image: a prefix that no completion follows or reads. The vision tower
    and the projector then run in every micro-batch, as ZeRO's collectives need where another rank has images; no row of
    the loss depends on the stand-in, so the gradient that flows through it is exactly zero.
    """
    row = _Row()
    prompts = [group.prompt for group in groups]
    for group in groups:
        row.add(group, _positions(group.prompt, family))
    if stand_in is not None:
        row.add(EncodedGroup(stand_in, (), ()), _positions(stand_in, family))
        prompts.append(stand_in)
    lengths = [end - start for spans in row.completion_spans for start, end in spans]
    with_images = [prompt.image_inputs for prompt in prompts if prompt.image_inputs]
    return GroupBatch(
        group_ids=tuple(group.prompt.record_id for group in groups),
        layout=PackedLayout(tuple(row.prefix_spans), tuple(row.completion_spans)),
        input_ids_T=torch.tensor(row.ids, dtype=torch.long),
        position_ids_XT=torch.cat(row.positions, dim=1),
        image_inputs=family.batch_image_inputs(with_images),
        predictor_rows_N=torch.tensor(row.rows, dtype=torch.long),
        target_N=torch.tensor(row.targets, dtype=torch.long),
        completion_of_token_N=torch.tensor(row.completion_of_token, dtype=torch.long),
        completion_starts_C1=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.long),
        pairs_P2=torch.tensor(row.pairs, dtype=torch.long).reshape(-1, 2),
        pair_weight_P=torch.full((len(row.pairs),), 0.0 if is_filler else 1.0),
        is_filler=is_filler,
        reference_keys=tuple(reference_keys),
    )


def _positions(prompt: EncodedPrompt, family: Family) -> torch.Tensor:
    return family.prefix_positions(torch.tensor(prompt.prefix_ids, dtype=torch.long), prompt.image_inputs)
