"""The choice among candidates at the merge."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap.job.merge import merge
from bpo.bootstrap.job.outcomes import Outcome
from bpo.config.bootstrap import BootstrapConfig
from bpo.config.measure import MeasureConfig
from bpo.config.select import SelectConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_groups
from bpo.records import Annotation, ContentPart, PreferenceGroup, Provenance, Turn
from tests.bootstrap.select.sets import share_with, telling_set

PROMPT = (Turn("user", (ContentPart("image"), ContentPart("text", "Describe."))),)
RECORDS = telling_set(400, 3, preferred=0.2, rejected=0.6)


def outcomes_of(key: str, texts: list[str], status: Any = "kept") -> list[Outcome]:
    source, _, candidate = key.partition("#")
    provenance = Provenance(source=source, candidate=int(candidate) if candidate else None)
    return [Outcome(f"r{i}", key, status, text, "no-real-change", provenance) for i, text in enumerate(texts)]


def candidates(num: int, source: str = "weaken") -> list[Outcome]:
    keys = [source, *(f"{source}#{number}" for number in range(1, num))]
    return [o for k, key in enumerate(keys) for o in outcomes_of(key, [texts[k] for texts in RECORDS[2]])]


def merged(
    folder: Path, outcomes: list[Outcome], select: dict[str, Any], num_records: int = 400, **bootstrap: Any
) -> tuple[Any, list[PreferenceGroup], list[dict[str, Any]]]:
    bootstrap = {"sources": ["weaken"], "select": SelectConfig(**select)} | bootstrap
    config = Config(
        data=DataConfig(groups=str(folder / "groups.jsonl")),
        bootstrap=BootstrapConfig(**bootstrap),
        measure=MeasureConfig(pairs=500, quick_pairs=500),
    )
    records = [Annotation(f"r{i}", (f"{i}.png",), PROMPT, text) for i, text in enumerate(RECORDS[1][:num_records])]
    summary = merge(config, records, {o.key: o for o in outcomes}, {}, {}, BadRecords())
    refused = (folder / "groups.jsonl.refused.jsonl").read_text().splitlines()
    return summary, list(read_groups(folder / "groups.jsonl")), [json.loads(line) for line in refused]


def negatives(groups: list[PreferenceGroup]) -> list[str]:
    return [completion.response for group in groups for completion in group.completions[1:]]


def test_selection_takes_one_candidate_per_record_and_lists_the_others(tmp_path: Path) -> None:
    summary, groups, refused = merged(tmp_path, candidates(3), {"candidates": 3, "balance": "selection"})
    assert len(groups) == 400 and all(len(group.completions) == 2 for group in groups)
    assert share_with("zebra", [texts[0] for texts in RECORDS[2]]) > 0.55
    assert share_with("zebra", negatives(groups)) < 0.35
    assert summary.kept == {"weaken": 400} and summary.refused == {"weaken": {"not-selected": 800}}
    taken = Counter(group.completions[1].provenance.candidate or 0 for group in groups)  # type: ignore[union-attr]
    assert set(taken) == {0, 1, 2}
    assert Counter(line.get("candidate", 0) for line in refused) == Counter(
        {number: 400 - count for number, count in taken.items()}
    )
    report = summary.selection["weaken"]
    assert report["accuracy"]["after"] < report["accuracy"]["before"] - 0.1
    assert json.loads((tmp_path / "groups.jsonl.summary.json").read_text())["selection"] == summary.selection


def test_the_choice_does_not_depend_on_the_order_of_the_outcomes(tmp_path: Path) -> None:
    select = {"candidates": 3, "balance": "selection", "block_records": 150}
    first = merged(tmp_path, candidates(3), select)
    assert merged(tmp_path, candidates(3)[::-1], select) == first
    assert merged(tmp_path, candidates(3), select, seed=1)[1] != first[1]


def test_weights_keep_all_candidates_of_every_record(tmp_path: Path) -> None:
    summary, groups, _ = merged(tmp_path, candidates(2), {"candidates": 2, "balance": "weights"})
    weights = [completion.weight for group in groups for completion in group.completions[1:]]
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-3) and len(weights) > 700
    assert all(group.completions[0].weight == 1 for group in groups)
    assert summary.kept == {"weaken": len(weights)} and summary.selection["weaken"]["pairs"] == len(weights)
    written = (tmp_path / "groups.jsonl").read_text()
    assert '"weight"' in written and max(map(len, map(str, weights))) <= 6  # four digits


def test_without_balance_the_first_usable_candidate_is_taken(tmp_path: Path) -> None:
    texts = [texts[0] for texts in RECORDS[2][:4]]
    first = outcomes_of("weaken", texts[:2]) + outcomes_of("weaken", texts, "refused")[2:]
    outcomes = [*first, *outcomes_of("weaken#1", ["a zebra", texts[1], "two zebras", "zebras"])]
    summary, groups, refused = merged(tmp_path, outcomes, {"candidates": 2}, num_records=4)
    assert negatives(groups) == [*texts[:2], "two zebras", "zebras"]
    assert [(line["id"], line["reason"], line.get("candidate")) for line in refused] == [
        ("r0", "not-selected", 1),
        ("r1", "duplicate", 1),  # as of a source without randomness
        ("r2", "no-real-change", None),
        ("r3", "no-real-change", None),
    ]
    assert refused[1]["detail"] == "same content as candidate 0 of `weaken`" and summary.selection == {}
    alone = merged(tmp_path, outcomes, {}, num_records=4)  # fewer candidates later: the others are not used
    assert negatives(alone[1]) == texts[:2] and len(alone[2]) == 2


def test_a_candidate_that_says_what_an_earlier_source_says_is_not_chosen(tmp_path: Path) -> None:
    same = [text.upper() for texts in RECORDS[2] for text in texts[:1]]
    inject = [*outcomes_of("inject", same), *outcomes_of("inject#1", [texts[2] for texts in RECORDS[2]])]
    select = {"candidates": 2, "balance": "selection"}
    summary, groups, _ = merged(tmp_path, [*candidates(1), *inject], select, sources=["weaken", "inject"])
    assert summary.kept == {"weaken": 400, "inject": 400}
    assert summary.refused == {"inject": {"duplicate": 400}}
    assert [group.completions[2].response for group in groups] == [texts[2] for texts in RECORDS[2]]


def test_target_shares_apply_to_the_chosen(tmp_path: Path) -> None:
    few = outcomes_of("inject", [f"{n} lions." for n in range(50)])
    summary, groups, _ = merged(
        tmp_path,
        [*candidates(3), *few],
        {"candidates": 3, "balance": "selection"},
        sources=["weaken", "inject"],
        target_shares={"weaken": 2.0, "inject": 1.0},
    )
    assert summary.kept == {"weaken": 100, "inject": 50}
    assert summary.refused["weaken"] == {"not-selected": 800, "surplus": 300}


def test_a_broken_record_is_listed_once(tmp_path: Path) -> None:
    outcomes = [o for k in ("weaken", "weaken#1") for o in outcomes_of(k, ["", ""], "broken")[:1]]
    outcomes += outcomes_of("weaken", ["x", "a zebra"])[1:]
    summary, groups, _ = merged(tmp_path, outcomes, {"candidates": 2}, num_records=2)
    assert summary.num_quarantined == 1 and [group.id for group in groups] == ["r1"]


def test_selection_without_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to choose from; set bootstrap.select.candidates above 1"):
        SelectConfig(balance="selection")
    SelectConfig(balance="selection", max_dropped_share=0.1)
