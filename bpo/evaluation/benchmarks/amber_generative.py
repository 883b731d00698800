"""AMBER's generative part (arXiv 2311.07397): hallucinated and covered objects of descriptions, without a judge.

    chair = nouns that name nothing in the image / nouns          (nouns in AMBER's vocabulary; repeats count)
    cover = annotated objects of the image named / annotated objects
    hal   = descriptions with such a noun / descriptions
    cog   = likely hallucinations named / likely hallucinations   (`hallu` of the annotations)

As in the official `inference.py`, all sum over the data set before dividing, and denominators start at 0.001. With
`tagger: nltk` the nouns are the official ones; spaCy's differ where its tags or lemmas do, such as "man" for "men",
which WordNet's lemmatizer leaves. Similarities are those of the spaCy model (official: en_core_web_lg). The result's
name therefore has the model in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np

from bpo.evaluation.benchmark import Benchmark, Scores, Sums
from bpo.evaluation.benchmarks.amber_files import (
    START,
    AmberOptions,
    Annotated,
    official_answers,
    read_annotated,
    read_relations,
)
from bpo.evaluation.tagging import NounTagger, Words, prepare_words

# Words whose vectors are more similar than this name the same object.
THRESHOLD = 0.8


@dataclass(kw_only=True)
class AmberGenerativeOptions(AmberOptions):
    """Options of AMBER's generative part.

    Attributes:
        spacy_model: Installed spaCy model with word vectors, or its folder.
        tagger: `spacy`; or `nltk`, whose nouns are the official ones.
    """

    type: str = "amber_generative"
    spacy_model: str = "en_core_web_lg"
    tagger: NounTagger = "spacy"


@dataclass(frozen=True, slots=True)
class Targets:
    """Objects, and the words that name them.

    Attributes:
        objects: Names; a repeated name counts repeatedly, but only its first object can be named.
        words: First the words related to each object, then the objects: the order in which they are tried.
        object_of_word: Index into `objects`, for each of `words`.
    """

    objects: tuple[str, ...]
    words: tuple[str, ...]
    object_of_word: tuple[int, ...]

    @classmethod
    def build(cls, objects: Sequence[str], relations: Mapping[str, Sequence[str]]) -> Targets:
        related = [(word, index) for index, name in enumerate(objects) for word in relations[name]]
        named = [*related, *((name, index) for index, name in enumerate(objects))]
        return cls(tuple(objects), tuple(word for word, _ in named), tuple(index for _, index in named))

    def exact(self, noun: str) -> set[int]:
        """The object that the noun names, as a set that is empty if there is none."""
        return {self.object_of_word[self.words.index(noun)]} if noun in self.words else set()

    def similar(self, noun: str, words: Words) -> set[int]:
        """The object of the first word that is similar to the noun, as for `exact`."""
        pairs = zip(self.words, self.object_of_word, strict=True)
        return set(islice((index for word, index in pairs if words.similarity(noun, word) > THRESHOLD), 1))

    def names(self, indices: set[int]) -> list[str]:
        return [self.objects[index] for index in sorted(indices)]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a description was read: (noun, "present", "hallucinated" or "ignored") and the objects it names."""

    nouns: tuple[tuple[str, str], ...]
    covered: set[int]
    cognitive: set[int]


def read_nouns(
    nouns: Sequence[str], present: Targets, likely: Targets, ignored: frozenset[str], words: Words
) -> Reading:
    """Decides about nouns, in the official order.

    A noun that equals a word of a present object is present. Otherwise it is compared with the words of likely
    hallucinations, exactly and by similarity, and each hit counts as named; only then similarity to a present object
    makes it present.
    """
    verdicts: list[tuple[str, str]] = []
    covered: set[int] = set()
    cognitive: set[int] = set()
    for noun in nouns:
        if noun in ignored:
            verdicts.append((noun, "ignored"))
            continue
        found = present.exact(noun)
        if not found:
            cognitive |= likely.exact(noun) | likely.similar(noun, words)
            found = present.similar(noun, words)
        covered |= found
        verdicts.append((noun, "present" if found else "hallucinated"))
    return Reading(tuple(verdicts), covered, cognitive)


@dataclass(frozen=True, kw_only=True)
class AmberGenerativeBenchmark(Benchmark):
    """Descriptions of AMBER's images; question ids are AMBER's."""

    Options = AmberGenerativeOptions
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"chair", "hal", "cog"})

    present: Mapping[str, Targets]
    likely: Mapping[str, Targets]
    vocabulary: frozenset[str]
    ignored: frozenset[str]
    load_words: Callable[[], Words]

    @classmethod
    def read(cls, options: AmberGenerativeOptions) -> AmberGenerativeBenchmark:
        label, load_words = prepare_words(options.spacy_model, options.tagger)
        found, files = read_annotated(options, "generative")
        relation_file, ignored_file = (options.path("data") / name for name in ("relation.json", "safe_words.txt"))
        relations = read_relations(relation_file)
        try:
            ignored = ignored_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"{ignored_file} cannot be read ({error.strerror}); check option 'data'") from error
        return cls(
            options=options,
            questions=tuple(each.question for each in found),
            files=(*files, str(relation_file), str(ignored_file)),
            label=label,
            present={each.question.id: _targets(each, "truth", relations) for each in found},
            likely={each.question.id: _targets(each, "hallu", relations) for each in found},
            vocabulary=frozenset(relations).union(*relations.values()),
            ignored=frozenset(ignored),
            load_words=load_words,
        )

    def score(self, answers: Sequence[str]) -> Scores:
        words = self.load_words()
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            present, likely = self.present[question.id], self.likely[question.id]
            nouns = [noun for noun in words.nouns(answer) if noun in self.vocabulary]
            reading = read_nouns(nouns, present, likely, self.ignored, words)
            hallucinated = [noun for noun, verdict in reading.nouns if verdict == "hallucinated"]
            counts = {
                "descriptions": 1.0,
                "with_hallucination": float(bool(hallucinated)),
                "nouns": float(len(nouns)),
                "hallucinated": float(len(hallucinated)),
                "present": float(len(present.objects)),
                "covered": float(len(reading.covered)),
                "likely": float(len(likely.objects)),
                "cognitive": float(len(reading.cognitive)),
            }
            rows.append((question.resampled, counts))
            read = {
                "nouns": [list(each) for each in reading.nouns],
                "hallucinated": hallucinated,
                "covered": present.names(reading.covered),
                "cognitive": likely.names(reading.cognitive),
            }
            items.append(question.item(answer, **read))
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        faithful = sums["descriptions"] - sums["with_hallucination"]
        return {
            "chair": sums["hallucinated"] / (sums["nouns"] + START),
            "cover": sums["covered"] / (sums["present"] + START),
            "hal": 1 - faithful / (sums["descriptions"] + START),
            "cog": sums["cognitive"] / (sums["likely"] + START),
        }

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        return official_answers(self.questions, answers)


def _targets(annotated: Annotated, key: str, relations: Mapping[str, Sequence[str]]) -> Targets:
    names = annotated.annotation.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{annotated.where}: field {key!r} is {names!r}; it must be a list of words")
    if unknown := [name for name in names if name not in relations]:
        raise ValueError(f"{annotated.where}: {key!r} has {unknown[0]!r}, which relation.json lacks; add it there")
    return Targets.build(names, relations)
