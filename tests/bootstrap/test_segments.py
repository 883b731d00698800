from __future__ import annotations

import pytest

from bpo.bootstrap.segments import cut_segment
from bpo.config.bootstrap import SegmentConfig


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "starts"),
    [(20, 5, range(13)), (8, 5, range(1)), (9, 5, range(2)), (6, 5, range(1)), (4, 256, range(1)), (1, 1, range(1))],
)
def test_segments_have_their_length_and_start_anywhere_up_to_three_tokens_before_the_end(
    num_tokens: int, max_tokens: int, starts: range
) -> None:
    ids = tuple(range(100, 100 + num_tokens))
    segments = [cut_segment(ids, seed, SegmentConfig(max_tokens=max_tokens)) for seed in range(300)]
    assert {segment.start for segment in segments} == set(starts)
    for segment in segments:
        assert segment.length == min(max_tokens, num_tokens)
        start, end = segment.start, segment.start + segment.length
        assert segment.prefix == ids[:start] and segment.suffix == ids[end:]


def test_start_and_end_of_the_annotation_stay_and_the_end_only_unless_the_model_ended() -> None:
    ids = tuple(range(100, 120))
    segment = cut_segment(ids, 3, SegmentConfig(max_tokens=5))
    generated = range(5)
    joined = segment.join(generated, ended=False)
    assert len(joined) == len(ids)
    assert joined == (*ids[: segment.start], *generated, *ids[segment.start + 5 :])
    assert segment.join((7, 8), ended=True) == (*ids[: segment.start], 7, 8)
