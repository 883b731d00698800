"""Packing of groups into one row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpo.data.cells import preference_pairs
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, EncodedPrompt, Encoder
from tests.sample_groups import encode_all, encoder_of, three_groups


@pytest.fixture(scope="module")
def encoder(tiny_llava_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, photo_root)


@pytest.fixture(scope="module")
def encoded(encoder: Encoder) -> list[EncodedGroup]:
    return encode_all(encoder, three_groups())


def test_pairs_are_all_with_a_higher_score() -> None:
    assert preference_pairs([1.0, 0.0, 0.0]) == [(0, 1), (0, 2)]
    assert preference_pairs([0.0, 2.0, 1.0]) == [(1, 0), (1, 2), (2, 0)]
    assert preference_pairs([1.0, 1.0]) == []


def group(name: str, prefix: list[int], *completions: list[int]) -> EncodedGroup:
    scores = tuple(float(k == 0) for k in range(len(completions)))
    return EncodedGroup(EncodedPrompt(name, tuple(prefix), {}), tuple(map(tuple, completions)), scores)


def test_row_is_prefixes_and_completions_without_padding(encoder: Encoder) -> None:
    groups = [group("a", [1, 2, 3], [10, 11], [20], [30, 31]), group("b", [4, 5], [40], [50, 51])]
    keys = [["a0", "a1", "a2"], ["b0", "b1"]]
    batch = collate_groups(groups, encoder.family, reference_keys=keys)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10, 11, 20, 30, 31, 4, 5, 40, 50, 51]
    assert batch.position_ids_XT.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2, 2, 3]]
    assert batch.layout.prefix_spans == ((0, 3), (8, 10))
    assert batch.layout.completion_spans == (((3, 5), (5, 6), (6, 8)), ((10, 11), (11, 13)))
    # The prefix's last row predicts every completion's first token; a completion's last token predicts nothing.
    assert batch.predictor_rows_N.tolist() == [2, 3, 2, 2, 6, 9, 9, 11]
    assert batch.target_N.tolist() == [10, 11, 20, 30, 31, 40, 50, 51]
    assert batch.loss_inputs.completion_of_token_N.tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    assert batch.loss_inputs.pairs_P2.tolist() == [[0, 1], [0, 2], [3, 4]]
    assert batch.loss_inputs.pair_weight_P.tolist() == [1.0, 1.0, 1.0]
    assert batch.group_ids == ("a", "b") and batch.group_of_cell == (0, 0, 0, 1, 1)
    assert batch.reference_keys == ("a0", "a1", "a2", "b0", "b1") and batch.num_pairs == 3
    assert batch.loss_inputs.num_completions == 5
    assert batch.image_inputs == {}


def test_separate_sequences_are_independent_padded_rows(tiny_llava_dir: Path, photo_root: Path) -> None:
    family = encoder_of(tiny_llava_dir, photo_root, share_prefix="never").family
    groups = [group("a", [1, 2, 3], [10, 11], [20]), group("b", [4, 5], [40], [50, 51])]
    batch = collate_groups(groups, family)
    assert batch.input_ids_T.view(4, 5).tolist() == [
        [1, 2, 3, 10, 11],
        [1, 2, 3, 20, 0],
        [4, 5, 40, 0, 0],
        [4, 5, 50, 51, 0],
    ]
    assert batch.sequence_inputs["attention_mask"].sum(1).tolist() == [5, 4, 3, 4]
    assert batch.sequence_inputs["attention_mask"].tolist()[2] == [1, 1, 1, 0, 0]
    assert batch.position_ids_XT.view(4, 5).tolist() == [[0, 1, 2, 3, 4]] * 4
    assert batch.layout.prefix_spans == ((0, 3), (10, 12))
    assert batch.layout.completion_spans == (((3, 5), (8, 9)), ((12, 13), (17, 19)))
    assert batch.predictor_rows_N.tolist() == [2, 3, 7, 11, 16, 17]
    assert batch.target_N.tolist() == [10, 11, 20, 40, 50, 51]
    assert batch.loss_inputs.completion_of_token_N.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.loss_inputs.pairs_P2.tolist() == [[0, 1], [2, 3]]
    assert batch.feature_rows_F is None and batch.image_inputs == {}


def test_images_of_separate_sequences_appear_once_and_features_repeat(tiny_llava_dir: Path, photo_root: Path) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root, share_prefix="never")
    batch = collate_groups(encode_all(encoder, three_groups()), encoder.family, stand_in=encoder.stand_in())
    assert batch.image_inputs["pixel_values"].shape[0] == 5  # one, two, one, the stand-in
    assert batch.feature_rows_F is not None
    assert batch.feature_rows_F.tolist() == [0, 0, 0, 1, 2, 1, 2, 3, 3, 4]  # rows: three, two, two, one
    assert batch.layout.completion_spans[-1] == ()


def test_images_of_all_groups_in_order(encoder: Encoder, encoded: list[EncodedGroup]) -> None:
    pixels = collate_groups(encoded, encoder.family).image_inputs["pixel_values"]
    assert pixels.shape[0] == 4  # one, two, one
    assert torch.equal(pixels, torch.cat([e.prompt.image_inputs["pixel_values"] for e in encoded]))
    without_images = EncodedGroup(EncodedPrompt("text", (5, 6), {}), ((7,), (8,)), (1.0, 0.0))
    mixed = collate_groups([without_images, encoded[0]], encoder.family)
    assert mixed.image_inputs["pixel_values"].shape[0] == 1


def test_order_of_groups_changes_nothing_within_a_group(encoder: Encoder, encoded: list[EncodedGroup]) -> None:
    forwards, backwards = collate_groups(encoded, encoder.family), collate_groups(encoded[::-1], encoder.family)
    (start, end), (last_start, last_end) = forwards.layout.prefix_spans[0], backwards.layout.prefix_spans[-1]
    assert torch.equal(forwards.input_ids_T[start:end], backwards.input_ids_T[last_start:last_end])
    assert torch.equal(forwards.position_ids_XT[:, start:end], backwards.position_ids_XT[:, last_start:last_end])


def test_filler_is_the_same_work_without_weight(encoder: Encoder, encoded: list[EncodedGroup]) -> None:
    real, filler = (collate_groups(encoded, encoder.family, is_filler=flag) for flag in (False, True))
    assert torch.equal(real.input_ids_T, filler.input_ids_T)
    assert real.loss_inputs.pair_weight_P.tolist() == [1.0] * 4
    assert filler.loss_inputs.pair_weight_P.tolist() == [0.0] * 4
    assert filler.is_filler and not real.is_filler


def test_a_pair_weighs_the_product_of_its_completions(encoder: Encoder) -> None:
    first = replace(group("a", [1, 2], [10], [20], [30]), weights=(0.5, 1.0, 4.0))
    batch = collate_groups([first, group("b", [4, 5], [40], [50])], encoder.family)
    assert batch.loss_inputs.pair_weight_P.tolist() == [0.5, 2.0, 1.0]
    assert not collate_groups([first], encoder.family, is_filler=True).loss_inputs.pair_weight_P.any()
