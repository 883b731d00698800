"""Token log-probs of groups do not depend on the micro-batches, which keep to their limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.data.encode import Encoder
from bpo.model.group_scores import GroupScorer, completion_places
from bpo.model.load import resolve_model
from bpo.model.policy import PolicyModel
from tests.sample_groups import encode_all, encoder_of, group, three_groups


def scorer_of(model_dir: Path, encoder: Encoder, share_prefix: Any) -> GroupScorer:
    options = ModelConfig(path=str(model_dir), dtype="float32", share_prefix=share_prefix)
    return GroupScorer(resolve_model(options, for_training=True), encoder)


@pytest.mark.parametrize("share_prefix", ["auto", "never"])
def test_micro_batches_keep_to_the_limit_and_change_nothing(
    share_prefix: str, tiny_llava_dir: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root, share_prefix=share_prefix)
    scorer = scorer_of(tiny_llava_dir, encoder, share_prefix)
    groups = list(enumerate(encode_all(encoder, three_groups() * 2)))
    forward, tokens = PolicyModel.forward, []

    def counted(self: PolicyModel, input_ids_T: torch.Tensor, *args: Any, **more: Any) -> Any:  # noqa: N803
        tokens.append(input_ids_T.numel())
        return forward(self, input_ids_T, *args, **more)

    monkeypatch.setattr(PolicyModel, "forward", counted)
    alone = list(scorer.score(groups, 1))
    assert len(tokens) == 6
    limit = 2 * max(tokens)
    tokens.clear()
    packed = list(scorer.score(groups, limit))
    assert 1 < len(tokens) < 6 and max(tokens) <= limit
    assert [item for item, _, _ in packed] == [0, 1, 2, 3, 4, 5]
    for (_, encoded, one), (_, _, other) in zip(alone, packed, strict=True):
        assert [len(values) for values in one] == [len(ids) for ids in encoded.completion_ids]
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_equal_completions_share_a_place(tiny_llava_dir: Path, photo_root: Path) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root)
    record = group("a", "a cat", "a dog", "a cat", "no")
    (encoded,) = encode_all(encoder, [record])
    places = completion_places(encoder, record, encoded)
    assert places[0] == places[2] and len({*places}) == len(encoded.completion_ids) == 3
    short = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=len(encoded.prompt.prefix_ids) + 3)
    (encoded,) = encode_all(short, [record])  # "a c" and "a d"
    assert completion_places(short, record, encoded) == [0, 1, 0, 2]
