"""CHAIR by its published definition, on cases made by hand."""

from __future__ import annotations

import logging

import pytest

from bpo.evaluation.chair import present_objects, score_descriptions
from bpo.formats.lexicon import ObjectLexicon, build_lexicon, singular_forms

COCO_LINES = [
    "person, girl, boy, man, woman, child, baby, passenger",
    "bus",
    "train",
    "airplane, jet, plane",
    "cat, kitten",
    "dog, puppy",
    "bear",
    "elephant",
    "tie",
    "wine glass",
    "knife",
    "bowl",
    "hot dog",
    "chair, seat",
    "couch, sofa",
    "potted plant, houseplant, plant",
    "dining table, table, desk",
    "toilet",
    "cell phone, mobile phone, phone",
    "traffic light, street light, stop light",
    "scissors",
    "skis, ski",
    "mouse",
    "bench",
    "bus stop shelter, shelter",
]


def lexicon_of(*lines: str) -> ObjectLexicon:
    return build_lexicon([name.strip() for name in line.split(",")] for line in lines)


COCO = lexicon_of(*COCO_LINES)


def named(text: str, lexicon: ObjectLexicon = COCO) -> list[str]:
    return [mention.object for mention in lexicon.mentions(text)]


@pytest.mark.parametrize(
    "text, objects",
    [
        ("A man pets a kitten.", ["person", "cat"]),
        ("A dog and another dog", ["dog", "dog"]),
        ("The DOG's bowl", ["dog", "bowl"]),
        ("two dogs, three buses and four benches", ["dog", "bus", "bench"]),
        ("women and children with knives", ["person", "person", "knife"]),
        ("people feed mice on sofas", ["person", "mouse", "couch"]),
        ("scissors and skis", ["scissors", "skis"]),
        ("a hot dog, hot dogs, a hot-dog and a dog", ["hot dog", "hot dog", "hot dog", "dog"]),
        ("wine glasses on a dining table beside a table", ["wine glass", "dining table", "dining table"]),
        ("a bus stop shelter beside a bus", ["bus stop shelter", "bus"]),
        ("a baby elephant and an adult bear", ["elephant", "bear"]),
        ("a baby and an elephant", ["person", "elephant"]),
        ("a baby animal", []),
        ("a baby zebra", []),
        ("a passenger train and a passenger jet", ["train", "airplane"]),
        ("a passenger in a train", ["person", "train"]),
        ("train tracks without a train", ["train"]),
        ("a bow tie", ["tie"]),
        ("a white toilet seat", ["toilet"]),
        ("a toilet with its seat up", ["toilet"]),
        ("an empty seat", ["chair"]),
        ("a category of doggerel on a plantation", []),
        ("", []),
    ],
)
def test_mentions(text: str, objects: list[str]) -> None:
    assert named(text) == objects


def test_mentions_say_where_they_stand() -> None:
    text = "Two  Mobile\nphones, a cat's bed."
    spans = [(mention.object, text[mention.start : mention.end]) for mention in COCO.mentions(text)]
    assert spans == [("cell phone", "Mobile\nphones"), ("cat", "cat")]


def test_the_two_word_rules_bend_to_the_file() -> None:
    assert named("a train track", lexicon_of("train", "train track, rail")) == ["train track"]
    assert named("a baby bear", lexicon_of("rock")) == []


def test_a_name_claimed_twice_goes_to_the_later_object(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lexicon = lexicon_of("tv, monitor", "laptop, monitor")
    assert named("a monitor", lexicon) == ["laptop"]
    assert "monitor" in caplog.text


@pytest.mark.parametrize("lines", [[], ["dog, "], ["!!"]])
def test_useless_synonyms_are_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError, match="no object|is empty"):
        lexicon_of(*lines)


def test_singular_forms_are_only_offered() -> None:
    assert singular_forms("glass") == ()
    assert "tie" in singular_forms("ties") and "berry" in singular_forms("berries")
    assert "leaf" in singular_forms("leaves") and "box" in singular_forms("boxes")


def test_present_is_instances_and_captions_together() -> None:
    assert present_objects(COCO, ["dining table"], ["A puppy under the desk."]) == {"dining table", "dog"}
    with pytest.raises(ValueError, match="'unicorn' is not in the synonyms"):
        present_objects(COCO, ["unicorn"])


def test_the_three_figures_by_hand() -> None:
    present = {1: frozenset({"dog", "cat", "bus"}), 2: frozenset({"bowl"}), 3: frozenset({"tie"})}
    result = score_descriptions(
        [
            (1, "A dog, a puppy, a chair, a chair and a cat."),  # 5 mentions, 2 hallucinated, 2 of 3 present named
            (2, "A bowl."),  # 1 mention, 1 of 1
            (3, "Something blue."),  # none, 0 of 1
        ],
        present,
        COCO,
    )
    assert (result.num_mentions, result.num_hallucinated_mentions) == (6, 2)
    assert result.chair_i == pytest.approx(2 / 6)
    assert result.chair_s == pytest.approx(1 / 3)
    assert result.recall == pytest.approx(3 / 5)
    first = result.descriptions[0]
    assert [mention.object for mention in first.hallucinated] == ["chair", "chair"]
    assert first.missing == ("bus",) and first.named == {"dog", "cat"}


def test_nothing_named_gives_zero_and_no_recall() -> None:
    result = score_descriptions([(1, "Nothing here.")], {1: frozenset({"dog"})}, COCO)
    assert (result.chair_i, result.chair_s, result.recall) == (0.0, 0.0, 0.0)


def test_an_image_may_be_described_more_than_once_but_not_without_ground_truth() -> None:
    result = score_descriptions([(1, "A dog."), (1, "A cat.")], {1: frozenset({"dog"})}, COCO)
    assert (result.chair_s, result.recall) == (0.5, 0.5)
    with pytest.raises(ValueError, match="image 2 has no ground truth"):
        score_descriptions([(2, "A dog.")], {1: frozenset()}, COCO)
