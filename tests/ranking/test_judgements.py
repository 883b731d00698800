"""Judgements on disk belong to the candidates and to the judge that they were made of and by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judgements import RESULT, JudgementWriter, open_judgements, read_judgements
from tests.sample_groups import three_groups


def test_results_of_several_processes_are_read_while_they_write(tmp_path: Path) -> None:
    first, second, third = three_groups()
    known = open_judgements(tmp_path, "chair", {"score": "count"})
    with JudgementWriter(tmp_path, 0) as writer, JudgementWriter(tmp_path, 1) as other:
        writer.append(RESULT, [(first, Scored((1.0, 2.0, 3.0), ({"a": 1}, {}, {"ü": "\ud83d"})))])
        assert known.of(first) is None and known.poll() == 1
        other.append("policy", [(second, Scored((0.5, 1.5)))])
        other.append("policy", [(third, Failed("no image"))])
        known.poll()
        with pytest.raises(ValueError, match="being written by another process"):
            JudgementWriter(tmp_path, 1)
    judgement = known.of(first)
    assert judgement.scored == Scored((1.0, 2.0, 3.0), ({"a": 1}, {}, {"ü": "\ud83d"}))
    assert known.of(second) is None and known.result(second, "policy") == Scored((0.5, 1.5))
    assert known.of(third) == Failed("no image") and known.failed == {"c": "no image"}
    assert known.result(third, "reference") == Failed("no image")
    again = read_judgements(tmp_path)
    assert again.of(first) == judgement and again.identity == {"judge": "chair", "score": "count"}


def test_judgements_of_changed_candidates_are_refused(tmp_path: Path) -> None:
    group, *_ = three_groups()
    known = open_judgements(tmp_path, "chair", {})
    with JudgementWriter(tmp_path, 0) as writer:
        writer.append(RESULT, [(group, Scored((1.0, 2.0, 3.0)))])
    known.poll()
    rescored = replace(group, completions=tuple(replace(c, score=7.0, weight=2.0) for c in group.completions))
    assert known.of(rescored) == known.of(group)  # scores and weights are not what was judged
    answers = (replace(group.completions[0], response="a cow"), *group.completions[1:])
    for changed in (replace(group, completions=answers), replace(group, images=("tall.png",))):
        with pytest.raises(ValueError, match=r"group 'a' has a judgement of another .* Remove the folder"):
            known.of(changed)


def test_another_judge_or_option_is_refused_with_the_differences(tmp_path: Path) -> None:
    open_judgements(tmp_path, "chair", {"score": "count", "files": ("a", "b")})
    open_judgements(tmp_path, "chair", {"score": "count", "files": ("a", "b")})
    with pytest.raises(ValueError, match=r"score was 'count', is 'rate'. Undo the change, remove the folder"):
        open_judgements(tmp_path, "chair", {"score": "rate", "files": ("a", "b")})


def test_a_folder_without_judgements_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"identity.json cannot be read.*bpo rank"):
        read_judgements(tmp_path)
