"""Token log-probs of encoded groups: the forward pass of training on micro-batches, without gradients.

Shape letter: N response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, Encoder
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import ResolvedModel, load_resolved
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import PreferenceGroup

T = TypeVar("T")


class GroupScorer:
    """A loaded model, and the encoder of its groups.

    Args:
        model: Resolved with `for_training`, so that the log-probs are those of training and of the reference store.
        loaded: Its weights, if they are not those at its path.
    """

    def __init__(self, model: ResolvedModel, encoder: Encoder, loaded: Any = None):
        self.encoder = encoder
        self._policy = PolicyModel(load_resolved(model) if loaded is None else loaded).to(model.device).eval()
        self._device = model.device

    @torch.inference_mode()
    def score(
        self, groups: Iterable[tuple[T, EncodedGroup]], max_tokens: int
    ) -> Iterator[tuple[T, EncodedGroup, list[torch.Tensor]]]:
        """Yields each item with the log-probs (fp32, on the CPU) of its completions, in order.

        Args:
            groups: Items of any kind with their encoded group; taken as they are needed.
            max_tokens: Most tokens of a forward pass; a larger group has one of its own.
        """
        for batch in self._batches(groups, max_tokens):
            packed = collate_groups([encoded for _, encoded in batch], self.encoder.family)
            with packed_layout(packed.layout):
                logp_N = self._policy(**model_inputs(packed.to(self._device, self._policy.model.dtype))).cpu()
            lengths = [sum(map(len, encoded.completion_ids)) for _, encoded in batch]
            for (item, encoded), values_N in zip(batch, logp_N.split(lengths), strict=True):
                yield item, encoded, split_by_completion(encoded, values_N)

    def _batches(
        self, groups: Iterable[tuple[T, EncodedGroup]], max_tokens: int
    ) -> Iterator[list[tuple[T, EncodedGroup]]]:
        batch: list[tuple[T, EncodedGroup]] = []
        for item, encoded in groups:
            if batch and self._num_tokens([*(other for _, other in batch), encoded]) > max_tokens:
                yield batch
                batch = []
            batch.append((item, encoded))
        if batch:
            yield batch

    def _num_tokens(self, batch: list[EncodedGroup]) -> int:
        """Tokens of a forward pass, with the padding of separate sequences."""
        if self.encoder.family.separate_reason is None:
            return sum(group.num_tokens for group in batch)
        return sum(len(group.completion_ids) for group in batch) * max(group.longest_tokens for group in batch)


def split_by_completion(encoded: EncodedGroup, values_N: torch.Tensor) -> list[torch.Tensor]:
    """The values of each distinct completion."""
    return list(values_N.split([len(ids) for ids in encoded.completion_ids]))


def completion_places(encoder: Encoder, group: PreferenceGroup, encoded: EncodedGroup) -> list[int]:
    """For each completion of the record, its index in `encoded`, where equal completions are merged."""
    room = encoder.max_length_tokens - len(encoded.prompt.prefix_ids)
    place = {ids: index for index, ids in enumerate(encoded.completion_ids)}
    return [place[encoder.encode_completion(completion.response)[:room]] for completion in group.completions]
