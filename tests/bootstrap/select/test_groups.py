"""Balancing files of groups that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.bootstrap.select.groups import balance_groups
from bpo.config.measure import MeasureConfig
from bpo.config.select import SelectConfig
from bpo.formats.files import read_groups
from tests.bootstrap.select.sets import share_with, telling_set

MEASURE = MeasureConfig(pairs=500, quick_pairs=500)


def write_pairs(path: Path) -> Path:
    """TRL rows, which have no weights."""
    ids, preferred, rejected = telling_set(600, 1, preferred=0.3, rejected=0.6)
    rows = [
        {"id": name, "images": ["x.png"], "prompt": "What?", "chosen": chosen, "rejected": texts[0]}
        for name, chosen, texts in zip(ids, preferred, rejected, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_of_others_get_weights(tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "groups.jsonl"
    report = balance_groups(pairs, out, SelectConfig(balance="weights", block_records=250), measure=MEASURE)
    groups = read_groups(out)
    weights = [group.completions[1].weight for group in groups]
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-3) and len(set(weights)) > 3
    texts = ([group.completions[n].response for group in groups] for n in (0, 1))
    gap = [share_with("zebra", side, weights) for side in texts]
    assert gap[1] - gap[0] < 0.12 and list(report) == ["rejected"]
    assert report["rejected"]["accuracy"]["after"] < report["rejected"]["accuracy"]["before"]
    # The weights that are there are replaced.
    again = balance_groups(out, tmp_path / "again.jsonl", SelectConfig(balance="weights", block_records=250))
    assert again["rejected"]["pairs"] == len(groups)


def test_selection_keeps_one_answer_of_each_type(tmp_path: Path) -> None:
    ids, preferred, rejected = telling_set(300, 2, preferred=0.2, rejected=0.6)
    with (tmp_path / "in.jsonl").open("w") as file:
        for name, best, texts in zip(ids, preferred, rejected, strict=True):
            completions = [{"response": best, "score": 1, "type": "gt"}]
            completions += [{"response": text, "score": 0, "type": "mllm-hal"} for text in texts]
            completions += [{"response": f"{name} it is", "score": 0, "type": "other"}]
            file.write(json.dumps({"id": name, "images": [], "prompt": "?", "completions": completions}) + "\n")
    select = SelectConfig(balance="selection", candidates=2)
    report = balance_groups(tmp_path / "in.jsonl", tmp_path / "out.jsonl", select, measure=MEASURE)
    groups = read_groups(tmp_path / "out.jsonl")
    assert {tuple(c.type for c in group.completions) for group in groups} == {("gt", "mllm-hal", "other")}
    assert report["mllm-hal"]["pairs"] == report["other"]["pairs"] == 300
    assert share_with("zebra", [group.completions[1].response for group in groups]) < 0.45


def test_what_cannot_be_balanced_is_refused(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="balance is none"):
        balance_groups(pairs, tmp_path / "out.jsonl", SelectConfig())
    with pytest.raises(ValueError, match="the file that is read"):
        balance_groups(pairs, pairs, SelectConfig(balance="weights"))
