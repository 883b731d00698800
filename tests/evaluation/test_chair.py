"""CHAIR by its published definition, on cases made by hand."""

from __future__ import annotations

import pytest

from bpo.evaluation.chair import present_objects, score_descriptions
from bpo.formats.lexicon import ObjectLexicon, build_lexicon

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
