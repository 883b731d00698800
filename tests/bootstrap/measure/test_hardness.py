"""Dominating texts, false negatives, distances."""

from __future__ import annotations

import pytest

from bpo.bootstrap.changes import find_changes, load_lexicon
from bpo.bootstrap.measure.hardness import ObjectTruth, adds_nothing, hardness
from bpo.bootstrap.measure.pairs import TextPair
from bpo.formats.lexicon import build_lexicon

LEXICON = load_lexicon()


def pair(number: int, preferred: str, rejected: str, image: str = "") -> TextPair:
    return TextPair(f"r{number}", preferred, rejected, images=(image,) if image else ())


@pytest.mark.parametrize(
    ("preferred", "rejected", "expected"),
    [
        ("A red dog on a big table.", "A dog on a table.", True),
        ("A dog and a cat.", "This is a photo of a dog.", True),
        ("Two bikes near a tree.", "There are bicycles.", True),
        ("A dog on a table.", "A cat on a table.", False),
        ("A dog on a table.", "A red dog on a table.", False),
        ("A dog on a table.", "A dog under a table.", False),
        ("A dog.", "Three dogs.", False),
        ("There is no dog.", "There is a dog.", False),
        ("A dog.", "A dog barking.", False),
    ],
)
def test_what_adds_nothing_is_as_true_as_the_annotation(preferred: str, rejected: str, expected: bool) -> None:
    assert adds_nothing(find_changes(preferred, rejected, LEXICON), LEXICON) is expected


def test_false_negatives_are_counted() -> None:
    pairs = [pair(i, "A red dog on a table.", "A dog on a table." if i < 3 else "A cat on a table.") for i in range(12)]
    found = hardness(pairs, LEXICON, max_diffs=100)
    assert found.false_negatives == 0.25 and found.false_negative_examples == ("r0", "r1", "r2")
    assert found.num_diffs == 12 and found.words_changed == 2
    assert sum(found.similarity_histogram) == 12 and found.similarity_histogram[8] == 3
    assert found.kinds_of_pair[0] == {"attribute"} and found.kinds_of_pair[11] == {"attribute", "object"}
    assert hardness(pairs, LEXICON, max_diffs=4).num_diffs == 4


def test_the_most_frequent_text() -> None:
    pairs = [
        pair(i, f"A dog {i}.", "No  idea." if i % 4 == 0 else "no idea." if i % 4 == 1 else f"Cat {i}.")
        for i in range(40)
    ]
    found = hardness(pairs, LEXICON, max_diffs=10)
    assert (found.top_text, found.top_text_share, found.num_texts) == ("no idea.", 0.5, 40)


def test_truth_about_objects() -> None:
    truth = ObjectTruth(
        {"1.jpg": frozenset({"dog", "cat"}), "2.jpg": frozenset({"bus"})},
        build_lexicon([["dog"], ["cat"], ["bus", "coach"]]),
    )
    pairs = [
        pair(0, "A dog.", "A cat.", "val/1.jpg"),  # present: may be true
        pair(1, "A dog.", "A red cat.", "1.jpg"),  # present, but an attribute changed
        pair(2, "A dog.", "A coach.", "1.jpg"),  # absent
        pair(3, "A dog.", "A tree.", "1.jpg"),  # names no object of the truth
        pair(4, "A dog.", "A bus.", "other.jpg"),  # an image without truth
        pair(5, "A dog.", "A bus."),  # no image
    ]
    count = hardness(pairs, LEXICON, max_diffs=10, truth=truth).truth
    assert count is not None
    assert (count.num_pairs, count.objects_present, count.false_negatives) == (
        3,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    assert hardness(pairs[3:], LEXICON, max_diffs=10, truth=truth).truth is None
    assert truth.present(("1.jpg", "2.jpg")) == {"dog", "cat", "bus"} and truth.present(("1.jpg", "x.jpg")) is None


def test_no_pairs() -> None:
    found = hardness([], LEXICON, max_diffs=10, refused_share=1.0)
    assert (found.num_texts, found.top_text_share, found.false_negatives, found.refused_share) == (0, 0, 0, 1)
