"""Row lengths, and padding of packed rows to them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bpo.data.row_lengths import MULTIPLE, PIECE, choose_lengths, pad_row, padded_length, spaced_lengths
from bpo.model.attention.rows import segments_of
from tests.sample_groups import encoder_of, packed_batch, three_groups


def padded_tokens(num_tokens: list[int], lengths: tuple[int, ...]) -> int:
    return sum(padded_length(tokens, lengths) for tokens in num_tokens)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=12), st.integers(1, 5))
@example([64, 64, 64, 128, 640, 641], 2)
def test_no_other_lengths_pad_less(num_tokens: list[int], number: int) -> None:
    lengths = choose_lengths(num_tokens, number)
    assert len(lengths) <= number and list(lengths) == sorted(set(lengths)) and not any(n % MULTIPLE for n in lengths)
    assert lengths == choose_lengths(num_tokens[::-1], number)
    sizes = sorted({-(-tokens // MULTIPLE) * MULTIPLE for tokens in num_tokens})
    choices = [(*c, sizes[-1]) for k in range(number) for c in itertools.combinations(sizes[:-1], k)]
    assert padded_tokens(num_tokens, lengths) == min(padded_tokens(num_tokens, choice) for choice in choices)


def test_a_row_gets_the_shortest_length_that_fits() -> None:
    assert [padded_length(tokens, (128, 512)) for tokens in (1, 128, 129, 512)] == [128, 128, 512, 512]
    assert padded_length(513, (128, 512)) == 1024  # longer than any that was known: few lengths for these, too


def test_lengths_of_unknown_rows_reach_the_limit() -> None:
    assert spaced_lengths(8192, 4) == (2048, 4096, 6144, 8192)
    assert spaced_lengths(8000, 3) == (2688, 5376, 8000)
    assert spaced_lengths(100, 4) == (64, 128)


@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_padding_belongs_to_no_group(model: str, photo_root: Path, request: pytest.FixtureRequest) -> None:
    encoder = encoder_of(request.getfixturevalue(f"tiny_{model}_dir"), photo_root)
    batch = packed_batch(encoder, three_groups())
    count = batch.input_ids_T.numel()
    padded = pad_row(batch, (64, 448), encoder.family)
    assert padded.input_ids_T.shape == (448,) and padded.position_ids_XT.shape == (len(batch.position_ids_XT), 448)
    assert torch.equal(padded.input_ids_T[:count], batch.input_ids_T)
    assert torch.equal(padded.position_ids_XT[:, :count], batch.position_ids_XT)
    assert not (padded.input_ids_T[count:] == encoder.family.image_token_id).any()
    number = len(batch.layout.prefix_spans)
    assert padded.layout.prefix_spans[:number] == batch.layout.prefix_spans
    assert padded.layout.completion_spans[:number] == batch.layout.completion_spans
    pieces = padded.layout.prefix_spans[number:]
    assert not any(padded.layout.completion_spans[number:]) and max(end - start for start, end in pieces) <= PIECE
    segments = segments_of(padded.layout)
    assert [s.end for s in segments[:-1]] == [s.start for s in segments[1:]] and segments[-1].end == 448
    assert padded.predictor_rows_N is batch.predictor_rows_N and padded.useful_work == batch.useful_work
    assert pad_row(padded, (448,), encoder.family) is padded
