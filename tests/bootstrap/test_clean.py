"""Cleaning of rewritings."""

from __future__ import annotations

import pytest

from bpo.bootstrap.clean import clean_rewriting

ORIGINAL = "A cat sits on a mat."


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("A dog sits on a mat.", "A dog sits on a mat."),
        (" A dog sits on a mat.\n", "A dog sits on a mat."),
        ('"A dog sits on a mat."', "A dog sits on a mat."),
        ("“A dog sits on a mat.”", "A dog sits on a mat."),
        ("Modified description: A dog sits on a mat.", "A dog sits on a mat."),
        ('Modified description: "A dog sits on a mat."', "A dog sits on a mat."),
        ('"Modified answer: A dog sits on a mat."', "A dog sits on a mat."),
        ("**Modified description:** A dog sits on a mat.", "A dog sits on a mat."),
        ("Answer: 3", "3"),
        ("Sure! Here is the new description:\n\nA dog sits on a mat.", "A dog sits on a mat."),
        ('The sign says "stop"', 'The sign says "stop"'),
        ('"Stop" and "go"', '"Stop" and "go"'),
        ("Description is hard.", "Description is hard."),
        ("A poster: a dog.", "A poster: a dog."),
        ("Sure, here is the rewritten description: A dog sits on a mat.", "A dog sits on a mat."),
        ('Certainly! Here is the modified answer: "A dog sits on a mat."', "A dog sits on a mat."),
        ("Here's a slightly different photo: A dog sits on a mat.", "A dog sits on a mat."),
        ("Here is the new description: Modified description: A dog sits on a mat.", "A dog sits on a mat."),
        ("The rewritten description is: A dog sits on a mat.", "A dog sits on a mat."),
        ("Sure! A dog sits on a mat.", "A dog sits on a mat."),
        ("Here is the caption:\n**A dog sits on a mat.**", "A dog sits on a mat."),
        ("Here are three signs: one says stop.", "Here are three signs: one says stop."),
        ("Of course, the dog is there.", "Of course, the dog is there."),
        ("Sure.", "Sure."),
        ("", ""),
    ],
)
def test_wrapping_goes_and_the_text_stays(said: str, kept: str) -> None:
    assert clean_rewriting(said, ORIGINAL) == (kept, False)


def test_an_invented_next_turn_is_cut_and_the_rewriting_counts_as_finished() -> None:
    said = "A dog sits on a mat.\n\nDescription: Two birds fly.\n\nModified description: Thr"
    assert clean_rewriting(said, ORIGINAL) == ("A dog sits on a mat.", True)
    assert clean_rewriting("A dog.\nUSER: and now?", ORIGINAL) == ("A dog.", True)
    assert clean_rewriting("A dog.\nI changed the cat to a dog.", ORIGINAL) == ("A dog.", True)
    assert clean_rewriting("A dog.\n\nLet me know if you need more.", ORIGINAL) == ("A dog.", True)


def test_paragraphs_are_kept() -> None:
    assert clean_rewriting("One dog.\n\nTwo cats.", ORIGINAL) == ("One dog.\n\nTwo cats.", False)


def test_what_the_annotation_has_itself_is_not_taken_away() -> None:
    assert clean_rewriting('"Go"', '"Stop"')[0] == '"Go"'
    assert clean_rewriting("Answer: 4", "Answer: 3")[0] == "Answer: 4"
    own = "Here is the description: a cat."
    assert clean_rewriting("Here is the description: a dog.", own)[0] == "Here is the description: a dog."
    assert clean_rewriting("One.\nQuestion: two?", "Eins.\nQuestion: zwei?") == ("One.\nQuestion: two?", False)
