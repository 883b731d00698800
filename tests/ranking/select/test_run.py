"""The selection job, from files to files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bpo.config.selection import MixtureConfig, SelectionConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.files import read_groups
from bpo.model.weights import policy_fingerprint
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judgements import RESULT, JudgementWriter, open_judgements
from bpo.ranking.select.run import SelectSummary, run_select
from bpo.records import PreferenceGroup
from tests.ranking.candidates import write_groups
from tests.sample_groups import group


def candidates(count: int) -> list[PreferenceGroup]:
    """Records `g0`, `g1` ... whose rejected answers are longer on the whole."""
    return [group(f"g{n}", "a cat " * (1 + n % 7), "a dog " * (1 + n % 9) + str(n)) for n in range(count)]


def judge(folder: Path, results: dict[PreferenceGroup, Scored | Failed]) -> Path:
    open_judgements(folder, "chair", {"score": "count"})
    with JudgementWriter(folder, 0) as writer:
        writer.append(RESULT, results.items())
    return folder


def select(folder: Path, **options: object) -> SelectSummary:
    """Selects from candidates.jsonl to groups.jsonl."""
    config = Config(
        data=DataConfig(groups=str(folder / "groups.jsonl"), max_bad_share=0.2),
        select=SelectionConfig(candidates=str(folder / "candidates.jsonl"), **options),  # type: ignore[arg-type]
    )
    return run_select(config)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judged_candidates_become_groups(tmp_path: Path) -> None:
    first, second, third, fourth = records = [group(f"g{n}", "a", "b", "c") for n in range(4)]
    write_groups(tmp_path / "candidates.jsonl", records)
    with (tmp_path / "candidates.jsonl").open("a") as file:
        file.write("{not json}\n")
    scored = Scored((0.0, 2.0, 1.0), ({"why": "\ud83d"}, {}, {}))  # half a character, as of a server's reply
    results = {first: scored, second: Failed("no image"), third: Scored((1.0, 1.0, 1.0))}
    judged = judge(tmp_path / "judged", results)
    options = {"judgements": str(judged), "rule": "all"}
    with pytest.raises(ValueError, match="no judgement of 'g3'; run bpo rank again"):
        select(tmp_path, **options)
    assert not (tmp_path / "groups.jsonl").exists()
    judge(judged, {fourth: Scored((3.0, 0.0, 0.0))})
    summary = select(tmp_path, **options)
    assert [one.id for one in read_groups(tmp_path / "groups.jsonl")] == ["g0", "g3"]
    assert (summary.num_records, summary.num_groups, summary.num_pairs) == (4, 2, 5)
    assert summary.pairs_by_type == {"gt": 2, "mllm-hal": 3} and summary.dropped == {"failed": 1, "tie": 1}
    assert summary.means["score of gt"] == (3, pytest.approx(4 / 3))
    assert summary.means["characters of rejected"] == (5, 1.0)
    written = json.loads((tmp_path / "groups.jsonl.summary.json").read_text())
    assert written["num_pairs"] == 5 and written["judge"] == {"judge": "chair", "score": "count"}
    failed, unreadable = lines(tmp_path / "groups.jsonl.quarantine.jsonl")
    assert failed == {"record": "g1", "code": "failed", "error": "no image"} and summary.num_quarantined == 2
    assert unreadable["code"] == "not-json" and "candidates.jsonl" in str(unreadable["where"])


def test_lengths_are_balanced_over_the_whole_file(tmp_path: Path) -> None:
    records = candidates(200)
    write_groups(tmp_path / "candidates.jsonl", records)
    summary = select(tmp_path, length="balance")
    sides = [[len(c.response) for c in one.completions] for one in read_groups(tmp_path / "groups.jsonl")]
    excess = [rejected - chosen for chosen, rejected in sides]
    assert abs(sum(excess)) <= max(excess) and 100 < len(sides) < 200
    assert summary.dropped == {"length": 200 - len(sides)} and summary.num_pairs == len(sides)
    means = {name: mean for name, (_, mean) in summary.means.items()}
    assert means["characters of rejected before balancing"] > means["characters of preferred before balancing"] + 4
    assert means["characters of rejected"] == pytest.approx(means["characters of preferred"], abs=0.5)
    kept = {one.id for one in read_groups(tmp_path / "groups.jsonl")}
    write_groups(tmp_path / "candidates.jsonl", records[::-1])
    select(tmp_path, length="balance")
    assert {one.id for one in read_groups(tmp_path / "groups.jsonl")} == kept  # whatever the order of the file


def test_other_groups_are_mixed_in(tmp_path: Path) -> None:
    write_groups(tmp_path / "candidates.jsonl", candidates(10))
    mixed_before = [group(f"replay:x{n}", "a", "b") for n in range(30)]
    write_groups(tmp_path / "old.jsonl", [*candidates(40), *mixed_before])
    old = MixtureConfig(groups=str(tmp_path / "old.jsonl"), share=0.5)
    every = MixtureConfig(groups=str(tmp_path / "old.jsonl"), share=20)
    drawn = []
    for seed in (0, 0, 1):
        assert select(tmp_path, mixture=[old, every], seed=seed).mixed == [5, 40]
        ids = [one.id for one in read_groups(tmp_path / "groups.jsonl")]
        assert len(ids) == len(set(ids)) == 55 and not any("x" in name for name in ids)
        assert Counter(name.partition(":")[0] for name in ids)["replay"] == 45
        drawn.append(ids[10:15])
    assert drawn[0] == drawn[1] != drawn[2]


def test_ids_stay_unique(tmp_path: Path) -> None:
    """A record in two groups, and one that has the name of the second."""
    graded = [("a", 3.0, "x"), ("b", 2.0, "x"), ("c", 1.0, "x"), ("d", 0.0, "x")]
    write_groups(tmp_path / "candidates.jsonl", [group("g", *graded), group("g#2", ("a", 5.0, "x"), ("b", 0.0, "x"))])
    select(tmp_path, rule="all", min_margin=1.5)
    assert [one.id for one in read_groups(tmp_path / "groups.jsonl")] == ["g#1", "g#2", "g#2#2"]


def test_records_whose_sentences_are_not_found_are_quarantined(tmp_path: Path) -> None:
    records = [group(f"g{n}", "It is red.", "A cat. A dog.") for n in range(2)]
    write_groups(tmp_path / "candidates.jsonl", records)
    right, wrong = ([{"sentence": sentence, "label": True}] for sentence in ("A dog.", "A cow."))
    results = {one: Scored((1.0, 0.0), ({}, {"sentences": s})) for one, s in zip(records, (right, wrong), strict=True)}
    judged = judge(tmp_path / "judged", results)
    summary = select(tmp_path, judgements=str(judged), sentence_weight=3.0)
    (kept,) = read_groups(tmp_path / "groups.jsonl")
    assert kept.id == "g0" and kept.completions[1].token_weights == ((7, 13, 3.0),)
    (entry,) = lines(tmp_path / "groups.jsonl.quarantine.jsonl")
    assert entry["record"] == "g1" and "A cow." in str(entry["error"])
    assert summary.dropped == {"sentence not found": 1} and summary.num_pairs == 1


def test_the_policy_may_be_named_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    write_groups(tmp_path / "candidates.jsonl", candidates(1))
    fingerprint = policy_fingerprint(str(tmp_path / "model"))
    for policy in (str(tmp_path / "model"), fingerprint):
        with pytest.raises(ValueError, match=f"policy unknown, not of select.policy={fingerprint}"):
            select(tmp_path, policy=policy)


def test_what_cannot_be_selected_is_refused(tmp_path: Path) -> None:
    write_groups(tmp_path / "candidates.jsonl", candidates(3))
    with pytest.raises(ValueError, match=r"0 pairs .* without a pair: {'margin': 3}; generate more candidates"):
        select(tmp_path, min_margin=2)
    assert json.loads((tmp_path / "groups.jsonl.summary.json").read_text())["dropped"] == {"margin": 3}
    assert not (tmp_path / "groups.jsonl").exists()
    with pytest.raises(ValueError, match="name a file of its own"):
        select(tmp_path, mixture=[MixtureConfig(groups=str(tmp_path / "groups.jsonl"))])
