"""Content addresses of groups and cells."""

from __future__ import annotations

from dataclasses import replace

from bpo.config.loss import ViewConfig
from bpo.data.cells import Cell, CellPlan, TermSpec
from bpo.data.encode import EncodedGroup, EncodedPrompt, EncodedView
from bpo.data.reference_keys import cell_key, cell_keys, group_key, keys_by_cell, split_keys

GROUP = EncodedGroup(
    EncodedPrompt("a", (1, 2, 3), {}),
    ((10, 11), (20,)),
    (1.0, 0.0),
    views=(EncodedView("crop", EncodedPrompt("a", (1, 2, 3), {})),),
)
PLAIN = replace(GROUP, views=())


def test_a_groups_key_follows_images_and_tokens_only() -> None:
    key = group_key(PLAIN, ["digest"])
    renamed = replace(PLAIN, prompt=replace(PLAIN.prompt, record_id="other"), scores=(0.0, 1.0))
    assert group_key(renamed, ["digest"]) == key  # log-probs do not depend on scores or names
    longer = replace(PLAIN.prompt, prefix_ids=(1, 2, 3, 10))
    changed = [
        group_key(PLAIN, ["other digest"]),
        group_key(replace(PLAIN, completion_ids=PLAIN.completion_ids[::-1]), ["digest"]),
        group_key(replace(PLAIN, prompt=longer), ["digest"]),
        # the same tokens with another boundary between prompt and completion
        group_key(replace(PLAIN, prompt=longer, completion_ids=((11,), (20,))), ["digest"]),
        group_key(GROUP, ["digest"]),
    ]
    assert len({key, *changed}) == 6


def test_a_cells_key_does_not_depend_on_the_other_cells_of_its_group() -> None:
    more = replace(GROUP, completion_ids=(*GROUP.completion_ids, (30,)), scores=(1.0, 0.0, 0.5))
    assert (
        cell_key(GROUP, Cell("", 1), ["d"]) == cell_key(more, Cell("", 1), ["d"]) == cell_key(PLAIN, Cell("", 1), ["d"])
    )


def test_a_view_is_another_cell_and_depends_on_its_options_and_record() -> None:
    def key(options: str, group: EncodedGroup = GROUP) -> str:
        return cell_key(group, Cell("crop", 0), ["d"], lambda name: options)

    other_record = replace(GROUP, views=(replace(GROUP.views[0], prompt=replace(GROUP.prompt, record_id="b")),))
    other_record = replace(other_record, prompt=replace(GROUP.prompt, record_id="b"))
    second = cell_key(GROUP, Cell("", 0, argmax_of="crop"), ["d"], lambda name: "x")
    keys = [cell_key(GROUP, Cell("", 0), ["d"]), key("x"), key("y"), key("x", other_record), second]
    assert len(set(keys)) == 5
    assert key("x") == key("x")
    assert cell_key(GROUP, Cell("", 0), ["d"]) == cell_key(other_record, Cell("", 0), ["d"])  # clean images: no draw


def test_keys_are_those_of_the_cells_that_the_reference_scores() -> None:
    terms = (TermSpec(), TermSpec(pairs="image", against="crop", reference=False))
    plan = CellPlan(terms, {"crop": ViewConfig(type="crop")}).reference_pass()
    cells = plan.cells(GROUP)
    keys = cell_keys(GROUP, cells, ["d"], lambda name: "x")
    assert keys_by_cell(cells, keys) == {Cell("", k): cell_key(GROUP, Cell("", k), ["d"]) for k in (0, 1)}
    assert split_keys(keys) == [cell_key(GROUP, Cell("", k), ["d"]) for k in (0, 1)]
