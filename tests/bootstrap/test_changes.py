"""Changed words and their kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bpo.bootstrap.changes import changed_objects, find_changes, language_of, load_lexicon


def test_words_and_objects_that_came_and_went() -> None:
    before, after = "A dog and two cats on a sofa.", "A dog and three cats on a red couch."
    changes = find_changes(before, after, load_lexicon())
    assert changes.added == ("three", "red")
    assert changes.dropped == ("two",)
    assert changes.kinds == {"count", "attribute"}
    assert changes.distance == 2
    assert changed_objects(before, after, load_lexicon()) == ((), ())
    before, after = "A dog on a sofa.", "A zebra on a sofa."
    assert find_changes(before, after, load_lexicon()).kinds == {"object"}
    assert changed_objects(before, after, load_lexicon()) == (("zebra",), ("dog",))


def test_a_word_that_only_moved_is_no_change_of_content() -> None:
    changes = find_changes("a rock and a leaf", "a leaf and the rock", load_lexicon())
    assert changes.distance > 0 and not changes.kinds


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The dog is on the mat and the cat is there.", ("latin", "en")),
        ("Der Hund ist auf der Matte und die Katze nicht.", ("latin", "de")),
        ("Le chien est sur la table avec une femme.", ("latin", "fr")),
        ("El perro está en la mesa con una mujer.", ("latin", "es")),
        ("Two cats.", ("latin", None)),
        ("Собака на траве.", ("cyrillic", None)),
        ("一只狗", ("cjk", None)),
        ("42", (None, None)),
    ],
)
def test_language(text: str, found: tuple[str | None, str | None]) -> None:
    assert language_of(text) == found


def test_ones_own_lexicon(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    lists = {
        "attributes": ["shiny"],
        "counts": ["many"],
        "relations": ["atop"],
        "polarity": ["nope"],
        "style": ["okapi"],
    }
    path.write_text(yaml.safe_dump({"objects": ["widget, gadget"], **lists}))
    lexicon = load_lexicon(str(path))
    assert find_changes("a widget", "a gadget", lexicon).distance == 0
    assert not find_changes("a widget", "a widget okapi", lexicon).kinds
    path.write_text("objects: [a]\n")
    load_lexicon.cache_clear()
    with pytest.raises(ValueError, match=r"mine.yaml.*attributes"):
        load_lexicon(str(path))
    with pytest.raises(ValueError, match=r"lexicon .*missing.yaml"):
        load_lexicon(str(tmp_path / "missing.yaml"))


words = st.lists(st.sampled_from("a dog cat two red on the is okapi bikes bicycle".split()), max_size=12).map(" ".join)


@given(words, words)
def test_distance_is_a_count_of_words(before: str, after: str) -> None:
    changes = find_changes(before, after, load_lexicon())
    longest = max(len(before.split()), len(after.split()))
    assert (
        abs(len(before.split()) - len(after.split()))
        <= changes.distance
        <= longest + min(len(before.split()), len(after.split()))
    )
    assert 0 <= changes.distance and (changes.distance > 0 or len(before.split()) == len(after.split()))
    assert find_changes(before, before, load_lexicon()).distance == 0
