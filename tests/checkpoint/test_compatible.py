"""What may change between a checkpoint and the run that continues it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from bpo.checkpoint.compatible import FREE, ROUNDING, check_content, check_options
from bpo.checkpoint.files import CheckpointError
from bpo.config.io import all_keys, flat_tree, to_tree
from bpo.config.training import Config


def manifest() -> dict[str, Any]:
    fingerprints = {"data": "aaa", "weights": "bbb", "plan": "ccc", "plugin": "ddd"}
    return {"step": 40, "world_size": 2, "config": to_tree(Config()), "fingerprints": fingerprints}


def changed(**options: Any) -> dict[str, Any]:
    tree = copy.deepcopy(to_tree(Config()))
    for name, value in options.items():
        section, key = name.split("__")
        assert key in tree[section]
        tree[section][key] = value
    return tree


def test_an_unchanged_run_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    check_options(manifest(), changed(), 2, [])
    for name in ("data", "weights", "plan", "plugin"):
        check_content(manifest(), name, manifest()["fingerprints"][name], [])
    assert caplog.text == ""


def test_paths_and_operation_change_freely(caplog: pytest.LogCaptureFixture) -> None:
    now = changed(train__output_dir="elsewhere", train__save_every_steps=7, model__path="moved", data__num_workers=9)
    check_options(manifest(), now, 2, [])
    assert caplog.text == ""


def test_options_of_negatives_change_freely_unless_training_makes_them() -> None:
    now = changed()
    now["bootstrap"]["segment"]["max_tokens"] = 9
    check_options(manifest(), now, 2, [])
    online = copy.deepcopy(manifest())
    online["config"]["online"]["source"] = now["online"]["source"] = "segment"
    with pytest.raises(CheckpointError, match="bootstrap.segment.max_tokens: 256 -> 9"):
        check_options(online, now, 2, [])


def test_ranks_and_packing_change_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_options(manifest(), changed(train__max_micro_batch_tokens=99), 4, [])
    assert "2 -> 4 ranks, train.max_micro_batch_tokens 8192 -> 99" in caplog.text and "not bit for bit" in caplog.text


def test_what_decides_a_step_is_refused_field_by_field_with_the_flag_that_accepts_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = changed(train__lr=1e-3, train__epochs=5, loss__beta=0.3)
    with pytest.raises(CheckpointError) as refusal:
        check_options(manifest(), now, 2, ["train.epochs"])
    text = str(refusal.value)
    assert "step 40" in text and "train.lr: 2e-06 -> 0.001" in text and "loss.beta: 0.1 -> 0.3" in text
    assert "train.epochs:" not in text and '--train.accept_changes \'["loss.beta", "train.lr"]\'' in text
    with pytest.raises(CheckpointError, match="data.max_pixels: 0 -> 3136"):
        check_options(manifest(), changed(data__max_pixels=3136), 2, [])
    caplog.set_level(logging.WARNING)
    check_options(manifest(), now, 2, ["train.epochs", "train.lr", "loss.beta"])
    assert "another train.lr (accepted): 2e-06 -> 0.001" in caplog.text


@pytest.mark.parametrize(
    ("name", "why"),
    [("data", "groups"), ("weights", "base model"), ("plan", "order"), ("plugin", "losses may be others")],
)
def test_other_content_is_refused_with_its_meaning(name: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s){name}: .*{why}.*accept_changes '\[\"{name}\"\]'"):
        check_content(manifest(), name, "other", [])
    check_content(manifest(), name, "other", [name])


def test_an_option_that_the_checkpoint_does_not_know_is_left_out() -> None:
    old = manifest()
    del old["config"]["loss"]["beta"]
    check_options(old, changed(loss__beta=0.3), 2, [])
    del old["fingerprints"]["plugin"]
    check_content(old, "plugin", "", [])


def test_terms_views_and_options_of_a_loss_are_compared_as_a_whole() -> None:
    """A key that is new in a mapping of the user's is a change, not an option of another version."""
    old = manifest() | {"loss_states": {}}
    for key, value in (("options", {"tau": 0.1}), ("views", {"crop": {"type": "crop"}}), ("terms", [{"type": "nll"}])):
        with pytest.raises(CheckpointError, match=rf"loss\.{key}: "):
            check_options(old, changed(**{f"loss__{key}": value}), 2, [])


def test_a_run_with_ipo_on_sums_does_not_continue_with_means() -> None:
    old, now = manifest(), changed(loss__type="ipo")
    old["config"]["loss"] = {"type": "ipo", "beta": 0.1}  # as it was before lists of terms
    with pytest.raises(CheckpointError, match="loss.type: 'ipo on sums of log-probs'.*length: sum"):
        check_options(old, now, 2, [])
    check_options(old, now, 2, ["loss.type"])
    check_options(old | {"loss_states": {}}, now, 2, [])


def test_the_lists_name_options_that_exist() -> None:
    known = all_keys()
    unknown = [name for name in (*FREE, *ROUNDING) if name.removesuffix(".*") not in known]
    assert unknown == [] and set(FREE).isdisjoint(ROUNDING)
    assert flat_tree({"a": {"b": 1, "c": {"d": 2}}}) == {"a.b": 1, "a.c.d": 2}
