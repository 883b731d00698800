"""Cells, pairs of cells by rule, and how they are packed and numbered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpo.config.loss import ViewConfig
from bpo.data.cells import Cell, CellPair, CellPlan, TermSpec, merged, packed_members, register_pairs
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, EncodedPrompt, EncodedView, Encoder
from bpo.data.token_weights import register_token_weights
from tests.sample_groups import encoder_of

VIEWS = {name: ViewConfig(type="noise") for name in ("crop", "noise", "other")}
PROMPT = EncodedPrompt("a", (1, 2, 3), {})
# Two rejected answers; views with prefixes of their own; an auxiliary prompt with its answer.
GROUP = EncodedGroup(
    PROMPT,
    ((10, 11), (20,), (30, 31)),
    (1.0, 0.0, 0.0),
    views=(
        EncodedView("crop", replace(PROMPT, prefix_ids=(4, 5))),
        EncodedView("noise", replace(PROMPT, prefix_ids=(6, 7, 8))),
        EncodedView("auxiliary0", replace(PROMPT, prefix_ids=(9,)), ((90, 91),)),
    ),
)
TWO_IMAGES = EncodedGroup(
    PROMPT,
    ((10, 11), (20,), (40,)),
    (1.0, 0.0, 1.0),
    described=("", "", "other"),
    views=(EncodedView("other", replace(PROMPT, prefix_ids=(4, 5))),),
)


@pytest.fixture(scope="module")
def encoder(tiny_llava_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, photo_root)


def plan_of(*terms: TermSpec) -> CellPlan:
    return CellPlan(terms, VIEWS)


def cells_of(*terms: TermSpec, group: EncodedGroup = GROUP) -> list[tuple[str, tuple[int, ...]]]:
    return list(plan_of(*terms).cells(group).packed)


def pairs_of(term: TermSpec, group: EncodedGroup = GROUP) -> list[tuple[Cell | None, Cell | None, float]]:
    return [(p.chosen, p.rejected, p.weight) for p in plan_of(term).cells(group).pairs[0]]


def test_only_the_cells_that_a_term_needs_are_packed() -> None:
    assert cells_of(TermSpec()) == [("", (0, 1, 2))]
    assert cells_of(TermSpec(pairs="chosen", reference=False)) == [("", (0,))]  # no rejected answer is computed
    assert cells_of(TermSpec(pairs="image", against="crop")) == [("", (0,)), ("crop", (0,))]
    assert cells_of(TermSpec(), TermSpec(pairs="auxiliary", reference=False))[1] == ("auxiliary0", (0,))


def test_image_pairs_and_anchors_count_once_per_preference_pair() -> None:
    assert pairs_of(TermSpec(pairs="image", against="crop")) == [(Cell("", 0), Cell("crop", 0), 2.0)]
    assert pairs_of(TermSpec(pairs="chosen")) == [(Cell("", 0), None, 2.0)]
    assert pairs_of(TermSpec(pairs="rejected")) == [(None, Cell("", 1), 1.0), (None, Cell("", 2), 1.0)]
    assert pairs_of(TermSpec(pairs="auxiliary")) == [(Cell("auxiliary0", 0), None, 2.0)]
    assert pairs_of(TermSpec(pairs="text", view="crop"))[0] == (Cell("crop", 0), Cell("crop", 1), 1.0)


def test_explored_answers_count_as_the_groups_pairs_in_pairs_or_not() -> None:
    flags = {"paired": (True, True, False), "explored": (False, True, True), "betas": (1.0, 0.5, 2.0)}
    group = replace(GROUP, scores=(1.0, 0.0, 2.0), **flags)
    assert pairs_of(TermSpec(), group) == [(Cell("", 0), Cell("", 1), 1.0)]  # the best answer is in no pair
    explored = plan_of(TermSpec(pairs="explored", view="crop")).cells(group).pairs[0]
    assert explored == (CellPair(Cell("crop", 1), None, 0.5, 0.5), CellPair(Cell("crop", 2), None, 0.5, 2.0))
    assert cells_of(TermSpec(), group=group) == [("", (0, 1))]
    assert cells_of(TermSpec(), TermSpec(pairs="explored"), group=group) == [("", (0, 1, 2))]
    none = TermSpec(pairs="explored")
    assert pairs_of(none) == [] and cells_of(TermSpec(), none) == [("", (0, 1, 2))]


def test_two_images_with_an_answer_each() -> None:
    """The answer to the other image is in no preference pair of the group's own image."""
    assert pairs_of(TermSpec(), TWO_IMAGES) == [(Cell("", 0), Cell("", 1), 1.0)]
    assert pairs_of(TermSpec(pairs="symmetric", against="other"), TWO_IMAGES) == [
        (Cell("", 0), Cell("", 2), 1.0),
        (Cell("other", 2), Cell("other", 0), 1.0),
    ]
    assert pairs_of(TermSpec(pairs="other", against="other"), TWO_IMAGES) == [(Cell("other", 2), None, 1.0)]


def test_a_second_target_needs_its_view_only_where_its_tokens_are_not_shared() -> None:
    own, shared = (TermSpec(pairs="argmax", against="noise", shared_tokens=flag) for flag in (False, True))
    assert cells_of(own) == [("", (0,)), ("noise", (0,))]
    assert cells_of(shared) == [("", (0,))]
    for term in (own, shared):  # the reference finds the tokens in any case
        assert plan_of(term).reference_pass().cells(GROUP).packed == (("", (0,)), ("noise", (0,)))
        assert plan_of(term).cells(GROUP).virtual == (Cell("", 0, argmax_of="noise"),)


def test_the_reference_pass_packs_what_the_reference_scores() -> None:
    guided = TermSpec(guidance_view="noise")
    plan = plan_of(guided, TermSpec(pairs="auxiliary", reference=False))
    assert [name for name, _ in plan.cells(GROUP).packed] == ["", "noise", "auxiliary0"]
    assert plan.reference_pass().cells(GROUP).packed == (("", (0, 1, 2)),)
    assert not CellPlan((TermSpec(reference=False),)).needs_reference


def test_equal_pairs_merge_and_their_weights_add_up() -> None:
    pair = CellPair(Cell("", 0), None, 0.5)
    assert merged([pair, replace(pair, beta=2.0), pair]) == [replace(pair, weight=1.0), replace(pair, beta=2.0)]


def test_a_view_is_one_more_prefix_with_its_cells_behind_it(encoder: Encoder) -> None:
    plan = plan_of(TermSpec(beta=0.5), TermSpec(pairs="image", against="crop", beta=0.25), TermSpec(pairs="chosen"))
    batch = collate_groups([GROUP], encoder.family, plan)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10, 11, 20, 30, 31, 4, 5, 10, 11]
    assert batch.position_ids_XT.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2, 3]]
    assert batch.layout.prefix_spans == ((0, 3), (8, 10)) and batch.group_of_cell == (0, 0, 0, 0)
    # The first token of every completion of every view has a row that predicts it.
    assert batch.predictor_rows_N.tolist() == [2, 3, 2, 2, 6, 9, 10]
    inputs = batch.loss_inputs
    assert inputs.pairs_P2.tolist() == [[0, 1], [0, 2], [0, 3], [0, -1]]
    assert inputs.pairs_of_term == (2, 1, 1) and inputs.pair_weight_P.tolist() == [1, 1, 2, 2]
    assert inputs.pair_beta_P.tolist() == [0.5, 0.5, 0.25, 1.0]
    assert batch.num_pairs == 2


def test_second_targets_follow_the_packed_tokens(encoder: Encoder) -> None:
    plan = plan_of(TermSpec(), TermSpec(pairs="argmax", against="noise"))
    inputs = collate_groups([GROUP, GROUP], encoder.family, plan).loss_inputs
    assert inputs.second is not None
    # Per group five packed tokens on the clean image and two under noise: the rows of the preferred answer.
    assert inputs.second.base_M.tolist() == [0, 1, 7, 8] and inputs.second.source_M.tolist() == [5, 6, 12, 13]
    assert inputs.completion_starts_K1.tolist() == [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 18]
    assert inputs.pairs_P2.tolist()[-2:] == [[0, 8], [4, 9]]
    assert inputs.has_reference_N is not None
    assert inputs.has_reference_N.tolist() == ([True] * 5 + [False] * 2) * 2 + [True] * 4


def test_betas_of_the_data_multiply_those_of_the_term(encoder: Encoder) -> None:
    group = replace(GROUP, betas=(1.0, 0.5, 4.0))
    assert collate_groups([group], encoder.family, plan_of(TermSpec(beta=0.2))).loss_inputs.pair_beta_P.tolist() == (
        pytest.approx([0.1, 0.8])
    )


def test_token_weights_by_data_by_change_and_by_length(encoder: Encoder) -> None:
    group = replace(GROUP, completion_ids=((10, 11), (10,), (30, 31)), token_weights=((2.0, 3.0), (0.5,), (1.0, 1.0)))

    def sides(term: TermSpec) -> dict[int, list[float]]:
        weighed = collate_groups([group], encoder.family, plan_of(term)).loss_inputs.weighed
        assert weighed is not None and weighed.tokens_of_term == (len(weighed.token_E),)
        by_side: dict[int, list[float]] = {}
        for side, weight in zip(weighed.side_E.tolist(), weighed.weight_E.tolist(), strict=True):
            by_side.setdefault(side, []).append(weight)
        return by_side

    assert sides(TermSpec(token_weights="data")) == {0: [2, 3], 1: [0.5], 2: [2, 3], 3: [1, 1]}
    options = {"gamma": 5.0, "smallest_match": 1}
    assert sides(TermSpec(token_weights="changed", options=options)) == {0: [1, 5], 1: [1], 2: [5, 5], 3: [5, 5]}
    assert sides(TermSpec(ld_alpha=0.25)) == {0: [1, 0.25], 1: [1], 2: [1, 1], 3: [1, 1]}


def test_mdpo_costs_what_its_tokens_cost() -> None:
    """640 prompt tokens and answers of 150: 1,730 packed tokens; separate sequences would be 2,370."""
    prompt = replace(PROMPT, prefix_ids=tuple(range(640)))
    group = EncodedGroup(
        prompt, (tuple(range(150)), tuple(range(1, 151))), (1.0, 0.0), views=(EncodedView("crop", prompt),)
    )
    plan = plan_of(TermSpec(), TermSpec(pairs="image", against="crop"), TermSpec(pairs="chosen"))
    members = packed_members(group, plan.cells(group))
    assert sum(member.num_tokens for member in members) == 1730
    assert sum(len(m.prompt.prefix_ids) + len(ids) for m in members for ids in m.completion_ids) == 2370


def test_rules_of_plug_ins_have_names_of_their_own() -> None:
    for register in (register_pairs("text"), register_token_weights("data")):
        with pytest.raises(ValueError, match="already registered"):
            register(lambda *_: [])


def test_a_filler_has_no_weight_in_any_term(encoder: Encoder) -> None:
    plan = plan_of(TermSpec(), TermSpec(pairs="chosen"))
    batch = collate_groups([GROUP], encoder.family, plan, is_filler=True)
    assert not batch.loss_inputs.pair_weight_P.any() and batch.num_pairs == 0
    assert torch.equal(batch.input_ids_T, collate_groups([GROUP], encoder.family, plan).input_ids_T)
