"""The pairs of a record, and that its groups imply exactly these."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo.config.selection import SelectionConfig
from bpo.data.cells import preference_pairs
from bpo.formats.problems import RecordError
from bpo.formats.schema import group_from_json, group_to_json
from bpo.ranking.judge import Failed, Judgement, Scored
from bpo.ranking.select.groups import check_policy, choose, divide, groups_of, sentence_weights
from bpo.records import Completion, PreferenceGroup, Provenance
from tests.sample_groups import group

GT, SAMPLE = "gt", "mllm-sample"


def record(*texts: str) -> PreferenceGroup:
    """A record with an annotation and samples."""
    return group("r", *((text, float(k == 0), SAMPLE if k else GT) for k, text in enumerate(texts)))


def judgement(scores: list[float], *labels: list[tuple[str, bool]]) -> Judgement:
    details = tuple({"sentences": [{"sentence": s, "label": wrong} for s, wrong in of_one]} for of_one in labels)
    return Judgement("r", Scored(tuple(scores), details), {"name": "verifier", "identity": "12ab"})


def pairs_in(groups: list[PreferenceGroup]) -> list[tuple[str, str]]:
    """The pairs of texts that training sees in the groups as they are written."""
    read = [group_from_json(group_to_json(one), "here").own_completions for one in groups]
    return sorted(
        (own[i].response, own[j].response) for own in read for i, j in preference_pairs([c.score for c in own])
    )


def selected(rec: PreferenceGroup, judged: Judgement | None, **options: object) -> list[PreferenceGroup]:
    select = SelectionConfig(judgements="j" if judged else "", **options)  # type: ignore[arg-type]
    choice = choose(rec, judged, select)
    groups = list(groups_of(choice, choice.pairs, select))
    texts = [completion.response for completion in rec.completions]
    assert pairs_in(groups) == sorted((texts[i], texts[j]) for i, j in choice.pairs)
    return groups


def test_each_rule_gives_its_pairs_in_few_groups() -> None:
    rec, judged = record("a", "b", "c", "d"), judgement([-1.0, 0.5, -3.0, -2.0])
    (best,) = selected(rec, judged)
    assert [(c.response, c.score) for c in best.completions] == [("b", 1.0), ("c", 0.0)] and best.id == "r"
    assert best.completions[1].extra["judgement"] == {"score": -3.0, "name": "verifier", "identity": "12ab"}
    (top,) = selected(rec, judged, rule="top-bottom", k=2)
    assert [c.score for c in top.completions] == [1.0, 1.0, 0.0, 0.0]
    (every,) = selected(rec, judged, rule="all")
    assert [c.score for c in every.completions] == [-1.0, 0.5, -3.0, -2.0]  # one group shares the prompt
    apart = selected(rec, judged, rule="all", min_margin=1.2)  # b > a is left out, but both > c
    assert [one.id for one in apart] == ["r#1", "r#2"]
    assert pairs_in(apart) == [("a", "c"), ("b", "a"), ("b", "c"), ("b", "d")]
    drawn = selected(rec, judged, rule="all", max_pairs=2)
    assert len(pairs_in(drawn)) == 2 and pairs_in(drawn) == pairs_in(selected(rec, judged, rule="all", max_pairs=2))
    others = [pairs_in(selected(rec, judged, rule="all", max_pairs=2, seed=seed)) for seed in range(8)]
    assert len({tuple(pairs) for pairs in others}) > 2


@settings(max_examples=60)
@given(st.sets(st.sampled_from([(i, j) for i, j in itertools.combinations(range(5), 2)]), min_size=1), st.booleans())
def test_any_pairs_can_be_written_as_groups(pairs: set[tuple[int, int]], binary: bool) -> None:
    groups = divide(sorted(pairs), None if binary else [5.0, 4.0, 3.0, 2.0, 1.0])
    implied = [(i, j) for scores in groups for i in scores for j in scores if scores[i] > scores[j]]
    assert sorted(implied) == sorted(pairs) and len(groups) <= len({i for i, _ in pairs})
    assert not binary or all(set(scores.values()) == {0.0, 1.0} for scores in groups)


def test_groups_without_a_judge_stay_as_they_are() -> None:
    rec = record("a", "b", "c")
    assert selected(rec, None, rule="all") == [rec]
    graded = group("r", ("a", 3.0, GT), ("b", 1.0, "x"), ("c", 0.0, "x"))
    assert selected(graded, None, rule="all") == [graded]
    unpaired = replace(graded, completions=(replace(graded.completions[0], paired=False), *graded.completions[1:]))
    assert pairs_in(selected(unpaired, None, rule="all")) == [("b", "c")]


def test_the_annotation() -> None:
    rec, judged = record("a", "b", "c", "A."), judgement([1.0, 1.0, 2.0, 0.0])
    assert pairs_in(selected(rec, judged, rule="all")) == [("c", "a"), ("c", "b")]
    assert pairs_in(selected(rec, judged, rule="all", annotation="drop")) == [("b", "A."), ("c", "A."), ("c", "b")]
    rec, judged = record("a", "b", "c", "A.", "d"), judgement([1.0, 1.0, 2.0, 0.0, -1.0])
    preferred = selected(rec, judged, rule="all", min_margin=2, annotation="prefer")
    # a ties with b and loses to c; `A.` has its words.
    assert pairs_in(preferred) == [("a", "b"), ("a", "d"), ("b", "d"), ("c", "d")]


@pytest.mark.parametrize(
    ("texts", "scores", "options", "reason"),
    [
        ("ab", [1.0, 1.0], {}, "tie"),
        ("ab", [1.0, 1.5], {"min_margin": 1.0}, "margin"),
        ("aA", [1.0, 0.0], {}, "equal texts"),
        ("ab", [1.0, 0.0], {"annotation": "drop"}, "equal texts"),
    ],
)
def test_why_a_record_has_no_pair(texts: str, scores: list[float], options: dict[str, object], reason: str) -> None:
    choice = choose(record(*texts), judgement(scores), SelectionConfig(judgements="j", **options))  # type: ignore[arg-type]
    assert (choice.reason, choice.pairs) == (reason, [])


def test_a_failure_of_the_judge_is_kept() -> None:
    choice = choose(record("a", "b"), Failed("no image"), SelectionConfig(judgements="j"))
    assert (choice.reason, choice.detail) == ("failed", "no image")


def test_the_explored_answer_stays() -> None:
    rec = group("r", ("a", 1.0, GT), ("b", 0.0, "mllm-greedy"), ("c", 0.0, SAMPLE), ("d", 0.0, "mllm-greedy"))
    (one,) = selected(rec, judgement([3.0, 2.0, 1.0, 1.5]), explored="mllm-greedy")
    assert [(c.response, c.paired, c.explored) for c in one.completions] == [
        ("a", True, False),
        ("b", False, True),
        ("c", True, False),
    ]
    several = selected(rec, judgement([3.0, -2.0, 1.0, 2.0]), explored="mllm-greedy", rule="all", min_margin=1.5)
    assert len(several) == 2 and all(any(c.explored for c in one.completions) for one in several)
    (graded,) = selected(rec, judgement([3.0, -2.0, -9.0, -5.0]), explored=GT, rule="all", annotation="drop")
    assert [(c.response, c.paired) for c in graded.completions][0] == ("a", False)
    assert graded.completions[0].score == -9.0  # not above those in pairs


def test_answers_about_other_images_stay() -> None:
    rec = replace(record("a", "b", "c"), other_images=("tall.png",))
    other = Completion("z", 5.0, "other", view="other")
    rec = replace(rec, completions=(*rec.completions, other))
    (one,) = selected(rec, judgement([1.0, 0.0, 0.5, 9.0]))
    assert [c.response for c in one.completions] == ["a", "b", "z"] and one.completions[2] == other


def test_sentences_filter_pairs_and_weigh_tokens() -> None:
    rec = record("It is red. It is big.", "A car. It is red. A car.", "Two dogs.", "No car.")
    judged = judgement(
        [0.0, -1.0, -1.0, 0.0],
        [("It is red.", False), ("It is big.", False)],
        [("A car.", False), ("It is red.", False), ("A car.", True)],
        [("Two dogs.", True)],
        [("No car.", False)],
    )
    options = {"rule": "all", "clean_chosen": True, "sentence_weight": 5.0}
    (one,) = selected(rec, judged, **options)
    assert [c.token_weights for c in one.completions] == [(), ((18, 24, 5.0),), ((0, 9, 5.0),), ()]
    assert selected(replace(rec, completions=rec.completions[::3]), judgement([1.0, 0.0], [], []), **options) == []
    # Weights hold for both sides, so an answer between two others is in two groups.
    chain = judgement([2.0, 1.0, 0.0, 0.0], *([(c.response, True)] for c in rec.completions))
    apart = selected(rec, chain, rule="all", sentence_weight=5.0)
    assert len(apart) == 2 and not any(c.score == 1 and c.token_weights for one in apart for c in one.completions)
    with pytest.raises(ValueError, match="need the judge verifier"):
        choose(rec, judgement([1.0, 0.0, 0.0, 0.0]), SelectionConfig(judgements="j", clean_chosen=True))


def test_a_sentence_that_is_not_in_the_answer() -> None:
    for sentences in (["It is blue."], ["It is big.", "It is red."], [""]):
        with pytest.raises(RecordError, match="is not in 'It is red. It is big.'"):
            labelled = [{"sentence": sentence, "label": False} for sentence in sentences]
            list(sentence_weights("It is red. It is big.", labelled, 2.0))


@pytest.mark.parametrize(
    ("provenance", "found"),
    [
        (Provenance("sample", model="m", policy="a" * 16), None),
        (Provenance("injected-errors", model="llm"), None),
        (Provenance("rules-of-a-plug-in"), None),
        (Provenance("sample", model="m", policy="b" * 16), "b" * 16),
        (Provenance("injected-errors", model="m", policy="b" * 16), "b" * 16),
        (Provenance("sample", model="m"), "unknown"),
        (None, "unknown"),
    ],
)
def test_answers_of_another_policy_are_refused(provenance: Provenance | None, found: str | None) -> None:
    rec = record("a", "b")
    rec = replace(rec, completions=(rec.completions[0], replace(rec.completions[1], provenance=provenance)))
    if found is None:
        check_policy(rec, "a" * 16, "c.jsonl")
        return
    with pytest.raises(ValueError, match=f"c.jsonl: group 'r': .*of policy {found}, not of select.policy={'a' * 16}"):
        check_policy(rec, "a" * 16, "c.jsonl")
