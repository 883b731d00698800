"""Why completions are refused. Run: python -m pytest tests/bootstrap/test_validate.py"""

from __future__ import annotations

import pytest

from bpo.bootstrap.validate import annotation_refusal, is_degenerate, refusal

ANNOTATION = "A photo with a rock and a leaf."


def why(response: str, annotation: str = ANNOTATION, **options: object) -> str | None:
    return refusal(response, annotation, **{"max_words": 350, **options})  # type: ignore[arg-type]


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
        (", , a , a", "degenerate"),
        ("...", "degenerate"),
        ("a tree and a tree and a tree and a tree and a tree", "degenerate"),
        ("tree tree tree tree", "degenerate"),
        ("It is veryveryveryveryveryveryveryvery big.", "degenerate"),
        ("a b c a b d a b c a b d a c b a c a b c d a b c d a b", "degenerate"),
        (" ".join(str(n) for n in range(351)), "too-long"),
        (" ".join(str(n) for n in range(350)), None),
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
    assert not is_degenerate(answer)


def test_a_long_ordinary_description_is_not_degenerate() -> None:
    text = (
        "The image shows a busy street with several people walking along the pavement. There are two cars and a bus on "
        "the road, and a traffic light in front of the bus. A man in a black jacket is holding an umbrella, and a "
        "woman next to him is carrying a bag. In the background there is a shop with a red sign above the door. "
    )
    assert not is_degenerate(text)
    assert is_degenerate(text * 4)


def test_a_negative_may_be_a_table_where_the_annotation_is_one() -> None:
    table = "| - | - |\n| a | 1 |"
    assert is_degenerate(table)
    assert why("| - | - |\n| b | 2 |", table) is None


def test_numbers_and_other_scripts_are_content() -> None:
    assert why("It costs 3.50 dollars.", "It costs 3.05 dollars.") is None
    assert why("一只狗在草地上。", "一只猫在草地上。") is None
    assert why("Two cats.", "Two dogs.") is None


def test_annotations() -> None:
    assert annotation_refusal("fine", max_words=350) is None
    assert annotation_refusal(" ", max_words=350) == "empty"
    assert annotation_refusal("word " * 351, max_words=350) == "too-long"
