"""Decisions of the merge."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.job.balance import thresholds
from bpo.bootstrap.job.merge import merge
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.job.statistics import SourceStatistics, percentile
from bpo.config.bootstrap import BootstrapConfig, SampleConfig, ValidateConfig
from bpo.config.select import SelectConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_groups
from bpo.records import Annotation, ContentPart, Provenance, Turn

PROMPT = (Turn("user", (ContentPart("image"), ContentPart("text", "Describe."))),)


def annotations(num: int) -> list[Annotation]:
    return [Annotation(f"r{i}", (f"{i}.png",), PROMPT, f"A dog and {i} cats.") for i in range(num)]


def outcome(record: int, source: str, text: str) -> Outcome:
    return Outcome(f"r{record}", source, "kept", text, provenance=Provenance(source=source))


def merged(folder: Path, records: int, outcomes: list[Outcome], **bootstrap: Any) -> tuple[Any, list[dict[str, Any]]]:
    options = BootstrapConfig(**{"sources": ["weaken", "inject"], **bootstrap})
    config = Config(data=DataConfig(groups=str(folder / "groups.jsonl")), bootstrap=options)
    summary = merge(config, annotations(records), {o.key: o for o in outcomes}, {}, {}, BadRecords())
    refused = (folder / "groups.jsonl.refused.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in refused]


def test_of_negatives_that_say_the_same_the_first_source_keeps_its_own(tmp_path: Path) -> None:
    outcomes = [outcome(0, "weaken", "A zebra."), outcome(0, "inject", "a ZEBRA"), outcome(1, "inject", "A zebra.")]
    summary, refused = merged(tmp_path, 2, outcomes)
    assert summary.kept == {"weaken": 1, "inject": 1}
    assert [(r["id"], r["source"], r["reason"]) for r in refused] == [("r0", "inject", "duplicate")]
    assert "`weaken`" in refused[0]["detail"]
    both, _ = merged(tmp_path, 2, outcomes, validate=ValidateConfig(refuse_duplicates=False))
    assert both.kept == {"weaken": 1, "inject": 2}


def test_candidates_of_a_judge_stay_whatever_they_say_and_only_equal_samples_are_left_out(tmp_path: Path) -> None:
    texts = {"sample": "A dog and 0 cats.", "sample#1": "A ZEBRA.", "sample#2": "a zebra", "greedy": "A zebra."}
    outcomes = [outcome(0, source, text) for source, text in texts.items()] + [outcome(0, "weaken", "A zebra.")]
    outcomes.append(outcome(1, "sample", "A dog and 1 cats."))  # as the annotation: a group nevertheless
    options = {"sources": ["weaken", "sample", "greedy"], "sample": SampleConfig(count=3)}
    for number, select in enumerate([SelectConfig(), SelectConfig(candidates=2, balance="selection")]):
        (folder := tmp_path / str(number)).mkdir()
        summary, refused = merged(folder, 2, outcomes, select=select, **options)
        assert summary.kept == {"weaken": 1, "sample": 3, "greedy": 1} and set(summary.selection) <= {"weaken"}
        assert [(r["source"], r["detail"]) for r in refused] == [("sample", "same content as candidate 1 of `sample`")]
        first, second = read_groups(folder / "groups.jsonl")
        types = ["gt", "mllm-hal", "mllm-sample", "mllm-sample", "mllm-greedy"]
        assert [completion.type for completion in first.completions] == types
        assert [completion.response for completion in second.completions] == ["A dog and 1 cats."] * 2
        assert summary.measures["mllm-hal"]["num_pairs"] == 1
        assert summary.measures["mllm-sample"]["num_pairs"] == 0  # nothing is rejected before it is judged


def test_target_shares_leave_out_what_the_plentiful_source_has_too_many_of(tmp_path: Path) -> None:
    outcomes = [outcome(i, "inject", f"A zebra and {i} cats.") for i in range(80)]
    outcomes += [outcome(i, "weaken", f"A horse and {i} cats.") for i in range(10)]
    shares = {"weaken": 1.0, "inject": 2.0}
    summary, refused = merged(tmp_path, 80, outcomes, target_shares=shares)
    assert summary.kept == {"weaken": 10, "inject": 20}
    assert Counter(r["reason"] for r in refused) == {"surplus": 60}
    groups = read_groups(tmp_path / "groups.jsonl")
    again, _ = merged(tmp_path, 80, outcomes[::-1], target_shares=shares)
    assert read_groups(tmp_path / "groups.jsonl") == groups and again == summary
    other, _ = merged(tmp_path, 80, outcomes, target_shares=shares, seed=1)
    assert other.kept == summary.kept and read_groups(tmp_path / "groups.jsonl") != groups


def test_surplus_of_sources_that_made_little_or_nothing() -> None:
    ranks = {"a": array("Q", range(7, 0, -1)), "b": array("Q", [5]), "c": array("Q")}
    assert thresholds(ranks, {"a": 3, "b": 1}) == {"a": 4}  # ranks 1, 2 and 3 stay
    assert thresholds(ranks, {"a": 1, "c": 1}) == {}
    assert thresholds(ranks, {"c": 1}) == {}


@pytest.mark.parametrize("shares", [{"crop": 1.0}, {"weaken": 0.0}])
def test_a_share_that_makes_no_sense_is_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"bootstrap\.target_shares"):
        BootstrapConfig(target_shares=shares)


def test_statistics_of_each_source_stand_in_the_summary(tmp_path: Path) -> None:
    outcomes = [outcome(i, "weaken", f"A zebra and {i} cats on a big red table.") for i in range(4)]
    merged(tmp_path, 4, outcomes)
    stored = json.loads((tmp_path / "groups.jsonl.summary.json").read_text())["statistics"]
    weaken = stored["weaken"]
    assert weaken["negatives"] == 4 and weaken["words"] == {"p5": 10, "p50": 10, "p95": 10}
    assert weaken["objects_added"] == {"zebra": 4, "table": 4} and weaken["objects_dropped"] == {"dog": 4}
    assert weaken["kinds_of_change"]["attribute"] == 4
    assert sum(weaken["similarity_histogram"]) == 4
    assert stored["inject"]["negatives"] == 0 and stored["inject"]["words"]["p50"] is None


def test_measures_stand_in_the_summary_and_their_warnings_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the records have no negative from inject; those that have one all end with the same word."""
    outcomes = [outcome(i, "inject", f"A dog and {i} zebras perhaps.") for i in range(100)]
    summary, _ = merged(tmp_path, 200, outcomes, sources=["inject"])
    stored = json.loads((tmp_path / "groups.jsonl.summary.json").read_text())["measures"]
    assert stored == summary.measures and list(stored) == ["llm-hal"]
    measures = stored["llm-hal"]
    assert measures["text"]["accuracy"] == 1 and measures["num_pairs"] == 100
    assert (measures["drift"]["num_all"], measures["drift"]["num_kept"]) == (200, 100)
    assert measures["hardness"]["refused_share"] == 0
    (warning,) = measures["warnings"]
    assert "llm-hal: the text alone tells" in warning and "perhaps" in warning
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [warning]


def test_similarity_is_the_share_of_words_that_stayed() -> None:
    statistics = SourceStatistics()
    statistics.add("one two three four five six seven eight nine ten", "red", load_lexicon())
    statistics.add("a dog", "a dog", load_lexicon())
    assert statistics.similarity[0] == statistics.similarity[9] == 1


def test_percentile_is_the_nearest_rank() -> None:
    counts = Counter(range(1, 101))
    assert [percentile(counts, p) for p in (5, 50, 95, 100)] == [5, 50, 95, 100]
    assert percentile(Counter(), 50) is None
