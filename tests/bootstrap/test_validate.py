"""Validation of completions."""

from __future__ import annotations

import pytest

from bpo.bootstrap.validate import REASONS, annotation_refusal, refusal, why_degenerate
from bpo.config.bootstrap import ValidateConfig

ANNOTATION = "A photo with a rock and a leaf."


def why(response: str, annotation: str = ANNOTATION, **options: object) -> str | None:
    found = refusal(response, annotation, **{"max_words": 350, **options})  # type: ignore[arg-type]
    return found.reason if found else None


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("A photo with a rock, a leaf and a tree.", None),
        ("", "empty"),
        (" \n\t", "empty"),
        (ANNOTATION, "unchanged"),
        (f"  {ANNOTATION}\n", "unchanged"),
        ("a PHOTO with a rock -- and a leaf!", "same-content"),
        ("A photo with a leaf and a rock.", "same-content"),
        ("A photo <image> with a tree.", "placeholder"),
        ("A photo of a <IMAGE> tree.", "placeholder"),
        ("<|image_pad|> A tree.", "placeholder"),
        ("A tree\x00.", "characters"),
        ("A tree\x1b[31m in red.", "characters"),
        ("A tree \ud83d.", "characters"),
        ("A tree 🌲\tin\na row.", None),
        (", , a , a", "degenerate"),
        ("...", "degenerate"),
        ("a tree and a tree and a tree and a tree and a tree", "degenerate"),
        ("tree tree tree tree", "degenerate"),
        ("It is veryveryveryveryveryveryveryvery big.", "degenerate"),
        ("a b c a b d a b c a b d a c b a c a b c d a b c d a b", "degenerate"),
        (" ".join(str(n) for n in range(351)), "too-long"),
        (" ".join(str(n) for n in range(350)), "length-ratio"),
    ],
)
def test_reason(response: str, reason: str | None) -> None:
    assert why(response) == reason


def test_the_models_own_control_tokens_are_refused() -> None:
    assert why("A tree. [/INST] And more", special_tokens=["</s>", "[/INST]"]) == "placeholder"
    assert why("A tree.", special_tokens=["", "</s>"]) is None


def test_text_cut_off_by_its_budget_is_unfinished() -> None:
    assert why("A photo with a tree and", finished=False) == "unfinished"


@pytest.mark.parametrize(
    "answer", ["3", "12:30", "$4.50", "No", "十二", "Да.", "a very, very, very big dog", "ha ha ha"]
)
def test_short_answers_are_not_degenerate(answer: str) -> None:
    assert why_degenerate(answer, ValidateConfig()) is None


def test_a_long_ordinary_description_is_not_degenerate() -> None:
    text = (
        "The image shows a busy street with several people walking along the pavement. There are two cars and a bus on "
        "the road, and a traffic light in front of the bus. A man in a black jacket is holding an umbrella, and a "
        "woman next to him is carrying a bag. In the background there is a shop with a red sign above the door. "
    )
    assert why_degenerate(text, ValidateConfig()) is None
    assert why_degenerate(text * 4, ValidateConfig()) == "0.17 of the words differ; at least 0.25 must"


def test_a_negative_may_be_a_table_where_the_annotation_is_one() -> None:
    table = "| - | - |\n| a | 1 |"
    assert why_degenerate(table, ValidateConfig())
    assert why("| - | - |\n| b | 2 |", table) is None


def test_numbers_and_other_scripts_are_content() -> None:
    assert why("It costs 3.50 dollars.", "It costs 3.05 dollars.") is None
    assert why("一只狗在草地上。", "一只猫在草地上。") is None
    assert why("Two cats.", "Two dogs.") is None


def test_annotations() -> None:
    assert annotation_refusal("fine", max_words=350) is None
    assert annotation_refusal(" ", max_words=350) == "empty"
    assert annotation_refusal("word " * 351, max_words=350) == "too-long"


@pytest.mark.parametrize(
    ("response", "annotation", "reason"),
    [
        ("The man rides a bicycle.", "A man rides a bike.", "no-real-change"),
        ("A very beautiful photo is shown with a rock and a leaf.", ANNOTATION, "no-real-change"),
        ("In the photo there seem to be a rock and also a leaf.", ANNOTATION, None),  # `in` is a relation
        ("A man rides a horse.", "A man rides a bike.", None),
        ("Two red cars.", "Two blue cars.", None),
        ("Two dogs and a cat.", "Three dogs and a cat.", None),
        ("A cup under the table.", "A cup on the table.", None),
        ("No, it is not.", "Yes, it is.", None),
        ("An okapi eats hay.", "A quagga eats hay.", None),  # a lexicon is never complete
        ("Il y a un chien et une femme sur la plage.", "There is a dog and a woman on the beach.", "language"),
        ("一只猫在草地上。", "A cat on the grass.", "language"),
        ("Yes.", "Yes, there is a dog on the left of the two cars.", None),
        ("A dog. " + " ".join(f"word{n}" for n in range(200)), "A cat.", "length-ratio"),
        ("A dog.", " ".join(f"word{n}" for n in range(200)), "length-ratio"),
    ],
)
def test_only_a_real_change_is_kept(response: str, annotation: str, reason: str | None) -> None:
    assert why(response, annotation) == reason


def test_thresholds_are_options() -> None:
    def strict(response: str, *, is_rewriting: bool = True, **options: object) -> str | None:
        return why(response, options=ValidateConfig(**options), is_rewriting=is_rewriting)  # type: ignore[arg-type]

    one_word = "A photo with a rock and a tree."
    assert strict(one_word, min_changed_words=2) == "few-changes"
    assert strict(one_word, min_changed_words=1) is None
    other = "Three dogs run along the beach today."
    assert strict(other, max_changed_share=0.5) == "other-text"
    assert strict(other, max_changed_share=0.5, is_rewriting=False) is None
    styled = "A very nice photo with a rock and a leaf."
    assert strict(styled) == "no-real-change"
    assert strict(styled, require_real_change=False) is None
    assert strict("Une photo avec le chat et la table.", same_language=False) is None
    assert strict("A photo.", min_length_ratio=0.9) == "length-ratio"
    looped = "A big tree, a big tree, a small leaf and a small rock."
    assert strict(looped) is None
    assert strict(looped, max_repeats=1) == "degenerate"
    assert strict(looped, min_distinct_share=0.6) == "degenerate"
    assert strict("tree " * 12 + "and leaf", max_repeats=20, max_length_ratio=20) == "degenerate"
    assert strict("tree " * 12 + "and leaf", max_repeats=20, max_length_ratio=20, min_distinct_share=0) is None


def test_a_refusal_says_what_was_found() -> None:
    found = refusal("The man rides a bicycle.", "A man rides a bike.", max_words=350)
    assert found is not None and found.detail == "added: the; dropped: a"
    long = refusal("one two three four", "five", max_words=3)
    assert long is not None and "4 words" in long.detail and long.reason in REASONS
    loop = refusal("A red leaf, a red leaf, a red leaf, a red leaf.", "A leaf.", max_words=350)
    assert loop is not None and loop.detail == "a phrase of 3 words 4 times in a row; at most 3"
