"""Balanced edits: each word is put in as often as taken out, in grammatical form, and never true of the image."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from bpo.bootstrap.changes import find_changes, load_lexicon
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.validate import refusal
from bpo.bootstrap.whole_set.outcomes import plan_whole_set
from bpo.bootstrap.whole_set.slots import find_slots, phrase_of, put
from bpo.config.negatives import EditConfig
from bpo.config.training import Config
from bpo.formats.lexicon import build_lexicon
from tests.bootstrap.whole_set.corpora import captions, config_of, kept, outcomes_of, record

ALL = frozenset(("object", "attribute", "count", "relation", "polarity"))


def edit_of(**options: Any) -> Config:
    return config_of(sources=["edit"], edit=EditConfig(**options))


def words(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in re.findall(r"\w+", text.casefold()))


@pytest.mark.parametrize("kinds", [["object"], ["attribute", "count"], ["object", "attribute", "count", "relation"]])
def test_each_word_is_put_in_as_often_as_it_is_taken_out(kinds: Any) -> None:
    draw = random.Random(4)
    annotations = captions(300, seed=2)
    annotations += [record(f"an-{n}", f"There is an {draw.choice(['orange car', 'elephant'])}.") for n in range(30)]
    pairs = kept(annotations, outcomes_of(edit_of(kinds=kinds), annotations))
    assert len(pairs) > 0.9 * 300
    assert words([a.response for a, _ in pairs]) == words([o.text for _, o in pairs])
    for annotation, outcome in pairs:
        changes = find_changes(annotation.response, outcome.text, load_lexicon())
        assert (len(changes.added), len(changes.dropped)) in ((1, 1), (2, 2))  # with its article
        assert outcome.provenance is not None and outcome.provenance.mode in kinds and changes.kinds
        assert refusal(outcome.text, annotation.response, max_words=350) is None
        assert not set(changes.added) & set(re.findall(r"\w+", annotation.response.casefold())) - {"a", "an"}


@pytest.mark.parametrize(
    ("text", "word", "donor_text", "donor", "expected"),
    [
        ("An elephant runs.", "elephant", "I see a dog.", "dog", "A dog runs."),
        ("Dogs run.", "dogs", "I see horses.", "horses", "Horses run."),
        ("The RED cars.", "red", "the blue hat", "blue", "The BLUE cars."),
        ("It is a traffic light.", "traffic light", "An apple.", "apple", "It is an apple."),
    ],
)
def test_article_number_and_case_are_kept(text: str, word: str, donor_text: str, donor: str, expected: str) -> None:
    lexicon = load_lexicon()
    (slot,) = [slot for slot in find_slots(text, lexicon, ALL) if slot.word == word]
    (given,) = [slot for slot in find_slots(donor_text, lexicon, ALL) if slot.word == donor]
    assert put(text, slot, phrase_of(donor_text, given)) == expected


def forms(text: str) -> dict[str, str]:
    return {slot.word: slot.form for slot in find_slots(text, load_lexicon(), ALL)}


def test_only_words_of_equal_form_exchange() -> None:
    found = forms("A dog, the cat, horses, grass, a red car and two blue buses on the left of 3 benches.")
    assert set(found) >= {"dog", "cat", "horses", "grass", "red", "two", "blue", "left", "3"}
    assert len({found[word] for word in ("dog", "cat", "horses", "grass", "red", "two", "blue", "left", "3")}) == 9
    assert forms("A dog.")["dog"] == forms("A bus.")["bus"] != forms("The bus.")["bus"]
    assert forms("Glasses.")["glasses"] == forms("Dogs.")["dogs"]


def test_words_whose_exchange_makes_no_sense_are_no_slots() -> None:
    assert not forms("A pine tree.")  # perhaps a name of two words
    assert "dog" not in forms("A dog and a cat. The dog is big.")
    assert set(forms("Yes.")) == {"yes"} and "yes" not in forms("Yes, it is.")


def test_synonyms_and_words_that_may_be_true_too_are_not_put_in() -> None:
    texts = (
        ["A big dog.", "A large dog."],
        ["A man.", "A person."],
        ["A bike.", "A bicycle."],
        ["Two dogs.", "Two dogs."],
    )
    for pair in texts:
        annotations = [record(number, text) for number, text in enumerate(pair)]
        assert [o and o.reason for o in outcomes_of(edit_of(), annotations)] == ["no-edit", "no-edit"]


def test_truth_and_the_question_limit_the_words() -> None:
    annotations = [record(0, "A dog."), record(1, "A cat.")]
    truth = ObjectTruth({"0.png": frozenset({"cat"})}, build_lexicon([["dog"], ["cat"]]))
    assert len(kept(annotations, outcomes_of(edit_of(), annotations))) == 2
    assert not kept(annotations, outcomes_of(edit_of(), annotations, truth))
    asked = [record(n, f"The dog is {c}.", "What colour is the dog?") for n, c in enumerate(["red", "blue"])]
    assert {o.text for _, o in kept(asked, outcomes_of(edit_of(), asked))} == {"The dog is red.", "The dog is blue."}


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_few_records(num: int) -> None:
    outcomes = outcomes_of(edit_of(), [record(n, text) for n, text in enumerate(["A dog.", "A cat.", "A dog."][:num])])
    assert sum(o is not None and o.status == "kept" for o in outcomes) == (2 if num > 1 else 0)
    assert len([o for o in outcomes if o and o.reason == "no-edit"]) == num % 2


def test_an_edit_does_not_repeat_the_swap_and_fills_only_what_it_leaves() -> None:
    annotations = [record(n, f"A {c} car.") for n, c in enumerate(["red", "blue", "green", "white"] * 5)]
    config = config_of(sources=["swap", "edit"])
    whole_set = plan_whole_set(config, annotations, lambda annotation: [])
    for position, annotation in enumerate(annotations):
        texts = [o.text for o in whole_set.of(position, annotation) if o.status == "kept"]
        assert len(set(texts)) == len(texts)
    config.bootstrap.edit.only_missing = True
    whole_set = plan_whole_set(config, annotations, lambda annotation: [])
    swapped = [o.source for n, a in enumerate(annotations) for o in whole_set.of(n, a) if o.status == "kept"]
    assert len(swapped) == len(annotations)


def test_the_result_depends_on_seed_and_records_only() -> None:
    annotations = captions(120)
    first = {a.id: o.text for a, o in kept(annotations, outcomes_of(edit_of(), annotations))}
    backwards = annotations[::-1]
    assert {a.id: o.text for a, o in kept(backwards, outcomes_of(edit_of(), backwards))} == first
    config = edit_of()
    config.bootstrap.seed = 1
    assert {a.id: o.text for a, o in kept(annotations, outcomes_of(config, annotations))} != first
