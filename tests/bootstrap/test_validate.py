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
    def strict(response: str, *, rewriting: str | None = "description", **options: object) -> str | None:
        return why(response, options=ValidateConfig(**options), rewriting=rewriting)  # type: ignore[arg-type]

    one_word = "A photo with a rock and a tree."
    assert strict(one_word, min_changed_words=2) == "few-changes"
    assert strict(one_word, min_changed_words=1) is None
    other = "Three dogs run along the beach today."
    assert strict(other, max_changed_share=0.5) == "other-text"
    assert strict(other, max_changed_share=0.5, rewriting=None) is None
    assert strict("I cannot see the image.", max_changed_share=1) == "refusal"
    assert strict("I cannot see the image.", max_changed_share=1, same_form=False) is None
    styled = "A very nice photo with a rock and a leaf."
    assert strict(styled) == "no-real-change"
    assert strict(styled, require_real_change=False) is None
    assert strict("Une photo avec le chat et la table.", same_language=False, max_changed_share=1) is None
    assert strict("A photo.", min_length_ratio=0.9) == "length-ratio"
    looped = "A big tree, a big tree, a small leaf and a small rock."
    assert strict(looped, max_changed_share=1) is None
    assert strict(looped, max_repeats=1) == "degenerate"
    assert strict(looped, min_distinct_share=0.6) == "degenerate"
    assert strict("tree " * 12 + "and leaf", max_repeats=20, max_length_ratio=20) == "degenerate"
    lenient = {"max_repeats": 20, "max_length_ratio": 20, "min_distinct_share": 0, "max_changed_share": 1}
    assert strict("tree " * 12 + "and leaf", **lenient) is None


def test_a_refusal_says_what_was_found() -> None:
    found = refusal("The man rides a bicycle.", "A man rides a bike.", max_words=350)
    assert found is not None and found.detail == "added: the; dropped: a"
    long = refusal("one two three four", "five", max_words=3)
    assert long is not None and "4 words" in long.detail and long.reason in REASONS
    loop = refusal("A red leaf, a red leaf, a red leaf, a red leaf.", "A leaf.", max_words=350)
    assert loop is not None and loop.detail == "a phrase of 3 words 4 times in a row; at most 3"


DESCRIBE = "Describe this image."


def rewritten(response: str, annotation: str, question: str = DESCRIBE, mode: str = "description") -> str | None:
    return why(response, annotation, question=question, rewriting=mode)


def answered(response: str, annotation: str, question: str) -> str | None:
    return rewritten(response, annotation, question, "qa")


@pytest.mark.parametrize(
    "reply", ["I'm sorry, but I can't see the image.", "As an AI, I cannot rewrite this.", "抱歉，我无法。"]
)
def test_refusals_are_refused_for_every_source_unless_the_annotation_is_one(reply: str) -> None:
    assert why(reply) == "refusal"
    assert rewritten(reply, ANNOTATION) == "refusal"
    assert why(
        reply, "I'm sorry, there is a dog in front of the camera.", options=ValidateConfig(same_language=False)
    ) in (
        None,
        "no-real-change",
    )


@pytest.mark.parametrize(
    ("reply", "question"), [("No.", DESCRIBE), ("Yes", "What colour is the car?"), ("No, it is.", "")]
)
def test_yes_and_no_are_no_descriptions(reply: str, question: str) -> None:
    assert rewritten(reply, ANNOTATION, question) == "yes-no"
    assert why(reply, ANNOTATION, question=question or DESCRIBE) == "yes-no"
    assert why(reply, "A cat sits on the mat.", question="Is there a dog?") is None
    assert why(reply, "Un chat est sur le tapis.", question="Y a-t-il un chien?") is None  # cannot be told


@pytest.mark.parametrize(
    ("response", "annotation", "reason"),
    [
        ("No", "Yes", None),
        ("No, there is not.", "Yes.", None),
        ("Yes, there is a small clock.", "No", None),
        ("No, the cup is on the right of the plate, near the edge of the table.", "Yes, it is.", None),
        ("Yes, it is.", "Yes.", "yes-no"),
        ("No, they are wearing gloves.", "No", "yes-no"),
        ("The cup is on the right of the plate.", "Yes, it is.", "yes-no"),
        ("No, it is.", "Yes, it is.", "yes-no"),  # contradicts itself
        ("No, there are two people.", "Yes, there are two people in the picture.", "yes-no"),
        ("Yes, there are three people.", "Yes, there are two people in the picture.", None),
        ("No, there are no people in the picture.", "Yes, there are two people in the picture.", None),
        ("No, they are not birds.", "No, there are no birds.", "yes-no"),
        ("Nein.", "Ja.", None),
    ],
)
def test_the_error_of_an_answer_by_yes_or_no_is_the_opposite(
    response: str, annotation: str, reason: str | None
) -> None:
    assert answered(response, annotation, "Is it so?") == reason


@pytest.mark.parametrize(
    ("response", "annotation", "question", "reason"),
    [
        ("The man is holding an umbrella.", "An umbrella.", "What does the man hold?", "no-real-change"),
        ("The man is holding a kite.", "An umbrella.", "What does the man hold?", None),
        ("The books are on the shelf.", "On the shelf.", "Where are the books?", "no-real-change"),
        ("The dog is black.", "The dog is white.", "Is the dog black or white?", None),
        ("There are 5 chairs.", "There are five chairs.", "How many chairs are there?", "few-changes"),
        ("He is holding a kite.", "He holds a kite.", "What is he doing?", "no-real-change"),
        ("A photo.", "A photo in a silver frame.", "What is next to the lamp?", "omission"),
        ("The skier is going down.", "A skier goes down a slope.", "What is he doing?", "omission"),
        ("Two paintings on the wall.", "Two paintings and a mirror.", "What is hanging on the wall?", "omission"),
        ("He's repairing a bike.", "He is repairing a bike.", "What is he doing?", "no-real-change"),
        ("A woman walks there.", "Two women walk there.", "What can be seen?", None),
        ("Dogs and cats.", "Two dogs and a cat near a tree.", "What can be seen?", "omission"),
        ("A magazine.", "A photo in a silver frame.", "What is next to the lamp?", None),
        ("The bike stands near the tree.", "The bike stands not near the tree.", "Where is the bike?", None),
        ("A grape and a pear lie in it.", "Apples.", "What is in the bowl?", None),
        (
            "The man is riding the snow machine and is doing it on the sled.",
            "Winter, because there is snow on the roofs.",
            "What season is it?",
            "other-text",
        ),
    ],
)
def test_an_error_in_an_answer_says_something_else(
    response: str, annotation: str, question: str, reason: str | None
) -> None:
    assert answered(response, annotation, question) == reason


def test_a_description_keeps_most_of_its_words_and_gains_an_error() -> None:
    annotation = "A woman sits at a kitchen table with a laptop in front of her."
    assert rewritten("A woman sits at a kitchen table with a cup in front of her.", annotation) is None
    assert rewritten("Three dogs are running along a sandy beach in the sun.", annotation) == "other-text"
    assert rewritten("A woman sits at a kitchen table.", annotation) == "omission"
    assert why("A woman sits at a kitchen table.", annotation, question=DESCRIBE) is None  # a model's own answer
    assert why("Three dogs are running along a sandy beach in the sun.", annotation, question=DESCRIBE) is None
