"""Every tensor of a batch of random groups, compared with lists that are written token by token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bpo.data.cells import CellPlan, TermSpec
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, EncodedPrompt
from bpo.data.families import Family
from tests.sample_groups import encoder_of

WEIGHTED = TermSpec(token_weights="data", ld_alpha=0.3)


@pytest.fixture(scope="module")
def families(tiny_llava_dir: Path, tiny_qwen_dir: Path, photo_root: Path) -> dict[str, Family]:
    return {
        "llava": encoder_of(tiny_llava_dir, photo_root).family,
        "qwen": encoder_of(tiny_qwen_dir, photo_root).family,
        "llava in rows": encoder_of(tiny_llava_dir, photo_root, share_prefix="never").family,
        "qwen in rows": encoder_of(tiny_qwen_dir, photo_root, share_prefix="never").family,
    }


def random_group(name: str, family: Family, rng: random.Random) -> EncodedGroup:
    """A group with text and up to three images in any order; the images of LLaVA have one token each."""

    def tokens(least: int, most: int) -> list[int]:
        return [rng.choice([3, 4, 5, 6]) + family.image_token_id for _ in range(rng.randint(least, most))]

    prefix, grids = tokens(1, 3), []
    for _ in range(rng.randint(0, 3)):
        grids.append((1, 2 * rng.randint(1, 3), 2 * rng.randint(1, 3)))
        count = grids[-1][1] * grids[-1][2] // 4 if "qwen" in family.config.model_type else 1
        prefix += [family.image_token_id] * count + tokens(0, 3)
    inputs = {}
    if grids and "qwen" in family.config.model_type:
        patches = sum(rows * columns for _, rows, columns in grids)
        inputs = {"pixel_values": torch.rand(patches, 4), "image_grid_thw": torch.tensor(grids)}
    elif grids:
        inputs = {"pixel_values": torch.rand(len(grids), 3, 28, 28)}
    answers = tuple(tuple(tokens(1, 4)) for _ in range(rng.randint(2, 4)))
    weights = tuple(tuple(rng.random() for _ in ids) for ids in answers)
    scores = tuple(float(rng.randint(0, 2)) for _ in answers)
    return EncodedGroup(EncodedPrompt(name, tuple(prefix), inputs), answers, scores, token_weights=weights)


def prefix_positions(group: EncodedGroup, family: Family) -> Iterator[tuple[int, ...]]:
    """The position of each token; arXiv 2409.12191, section 2.1."""
    ids = list(group.prompt.prefix_ids)
    if "qwen" not in family.config.model_type:
        yield from ((k,) for k in range(len(ids)))
        return
    grids = group.prompt.image_inputs["image_grid_thw"].tolist() if group.prompt.image_inputs else []
    position = 0
    while ids:
        if ids[0] != family.image_token_id:
            yield (position,) * 3
            position, ids = position + 1, ids[1:]
            continue
        _, rows, columns = (side // 2 for side in grids.pop(0))
        yield from ((position, position + row, position + column) for row in range(rows) for column in range(columns))
        position, ids = position + max(rows, columns), ids[rows * columns :]


def expected(groups: list[EncodedGroup], family: Family) -> dict[str, list]:
    """Ids, positions, rows and targets, token by token."""
    ids, positions, rows, targets, longest = [], [], [], [], max(group.longest_tokens for group in groups)
    for group in groups:
        prefix = list(prefix_positions(group, family))
        after = 1 + max(map(max, prefix))
        end_of_prefix = len(ids) + len(prefix) - 1
        for number, answer in enumerate(group.completion_ids):
            if family.separate_reason or number == 0:
                end_of_prefix = len(ids) + len(prefix) - 1
                ids += group.prompt.prefix_ids
                positions += prefix
            rows += [end_of_prefix, *range(len(ids), len(ids) + len(answer) - 1)]
            targets += answer
            padding = longest - len(prefix) - len(answer) if family.separate_reason else 0
            ids += [*answer, *[0] * padding]
            positions += [(after + k,) * len(prefix[0]) for k in range(len(answer) + padding)]
    return {
        "input_ids_T": ids,
        "position_ids_XT": [list(channel) for channel in zip(*positions, strict=True)],
        "predictor_rows_N": rows,
        "target_N": targets,
    }


def expected_weights(groups: list[EncodedGroup]) -> tuple[list[int], list[int], list[float]]:
    """Of the tokens of each pair's sides: index among all tokens, side, weight."""
    token, side, weight, before, pair = [], [], [], 0, 0
    for group in groups:
        lengths = [len(answer) for answer in group.completion_ids]
        starts = list(itertools.accumulate(lengths, initial=before))
        for i, j in itertools.product(range(len(lengths)), repeat=2):
            if group.scores[i] <= group.scores[j]:
                continue
            for k, own in enumerate((i, j)):
                for n, w in enumerate(group.token_weights[own]):
                    token.append(starts[own] + n)
                    side.append(2 * pair + k)
                    weight.append(w if n < min(lengths[i], lengths[j]) else 0.3 * w)
            pair += 1
        before += sum(lengths)
    return token, side, weight


@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(["llava", "qwen", "llava in rows", "qwen in rows"]))
@example(0, 4, "qwen").via("images without text between them")
@example(1, 3, "qwen in rows")
def test_values_are_those_of_lists(families: dict[str, Family], seed: int, count: int, name: str) -> None:
    rng, family = random.Random(seed), families[name]
    groups = [random_group(str(number), family, rng) for number in range(count)]
    batch = collate_groups(groups, family, CellPlan((WEIGHTED,), every_completion=True))
    for field, values in expected(groups, family).items():
        tensor = getattr(batch, field)
        assert tensor.dtype == torch.long and tensor.tolist() == values, field
    lengths = [len(answer) for group in groups for answer in group.completion_ids]
    inputs = batch.loss_inputs
    assert inputs.completion_of_token_N.tolist() == [k for k, n in enumerate(lengths) for _ in range(n)]
    assert inputs.completion_starts_K1.tolist() == [0, *itertools.accumulate(lengths)]
    token, side, weight = expected_weights(groups)
    if inputs.weighed is None:
        assert not token
        return
    assert inputs.weighed.token_E.tolist() == token and inputs.weighed.side_E.tolist() == side
    assert torch.equal(inputs.weighed.weight_E, torch.tensor(weight, dtype=torch.float32))
    assert inputs.weighed.tokens_of_term == (len(token),)
