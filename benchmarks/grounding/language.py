"""Captions of natural variety, questions with answers, and the facts that a text asserts about a scene."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.grounding.world import COLOURS, GROUNDS, THINGS, Placed, Scene, companions

DESCRIBE = ("Describe the picture.", "What do you see in this image?", "Write a short description of the photo.")
_OPENINGS = (
    "There is {}.",
    "The picture shows {}.",
    "I can see {}.",
    "This is a photo of {}.",
    "In the picture there is {}.",
    "The image contains {}.",
)
_GROUND = ("In the background there is {}.", "Behind it you see {}.", "The background is {}.")
_NAMES = "|".join(sorted((re.escape(thing.name) for thing in THINGS), key=len, reverse=True))
_MENTION = re.compile(rf"\b(?:({'|'.join(COLOURS)})\s+)?({_NAMES})s?\b")
_SIDE = re.compile(rf"\b({_NAMES}) is to the (left|right) of the ({_NAMES})\b")
_COLOUR_IS = re.compile(rf"\b({_NAMES}) is ({'|'.join(COLOURS)})\b")
_GROUNDS_RE = re.compile("|".join(re.escape(ground.words) for ground in GROUNDS.values()))


def listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def noun_phrase(item: Placed, with_colour: bool) -> str:
    words = f"{item.colour} {item.thing.name}" if item.colour and with_colour else item.thing.name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true description: all things from left to right, most colours, half of the time a relation and the ground."""
    phrases = [noun_phrase(item, rng.random() < 0.85) for item in scene.placed]
    sentences = [_OPENINGS[int(rng.integers(len(_OPENINGS)))].format(listed(phrases))]
    if rng.random() < 0.5 and (relation := _relation(scene, rng)):
        sentences.append(relation)
    if rng.random() < 0.5:
        sentences.append(_GROUND[int(rng.integers(len(_GROUND)))].format(GROUNDS[scene.ground].words))
    return " ".join(sentences)


def _relation(scene: Scene, rng: np.random.Generator) -> str:
    pairs = [(a, b) for a in scene.placed for b in scene.placed if a.column < b.column]
    if not pairs:
        return ""
    left, right = pairs[int(rng.integers(len(pairs)))]
    if rng.random() < 0.5:
        return f"The {left.thing.name} is to the left of the {right.thing.name}."
    return f"The {right.thing.name} is to the right of the {left.thing.name}."


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question of one of three kinds with its true answer."""
    coloured = [item for item in scene.placed if item.colour]
    kind = rng.random()
    if kind < 0.25 and coloured:
        item = coloured[int(rng.integers(len(coloured)))]
        return f"What colour is the {item.thing.name}?", f"The {item.thing.name} is {item.colour}."
    if kind < 0.5 and (relation := _relation(scene, rng)):
        a, side, b = _SIDE.findall(relation)[0]
        return f"Is the {a} to the left or to the right of the {b}?", f"The {a} is to the {side} of the {b}."
    present = rng.random() < 0.5
    return existence(scene, rng, present=present, expected=rng.random() < 0.5)


def existence(scene: Scene, rng: np.random.Generator, *, present: bool, expected: bool) -> tuple[str, str]:
    """A yes/no question: about a thing that is there, or one that is not but which the prior expects (`expected`)."""
    if present:
        pool = list(scene.names)
    else:
        mates = companions(scene.names)
        absent = [thing.name for thing in THINGS if thing.name not in scene.names]
        pool = mates if expected and mates else [name for name in absent if name not in mates] or absent
    name = pool[int(rng.integers(len(pool)))]
    article = "an" if name[0] in "aeiou" else "a"
    return f"Is there {article} {name} in the picture?", f"Yes, there is {article} {name}." if present else (
        f"No, there is no {name}."
    )


@dataclass(frozen=True)
class Fact:
    """An assertion of a text: kind (object, colour, side, ground), its words, and whether it holds in the scene."""

    kind: str
    words: str
    holds: bool


def facts(text: str, scene: Scene) -> Iterator[Fact]:
    """Every assertion of a description, in order of kinds; each object, colour and ground counts once."""
    folded = text.casefold()
    by_name = {item.thing.name: item for item in scene.placed}
    mentions = _MENTION.findall(folded)
    for name in dict.fromkeys(name for _, name in mentions):
        yield Fact("object", name, name in by_name)
    colours = [(colour, name) for colour, name in mentions if colour]
    colours += [(colour, name) for name, colour in _COLOUR_IS.findall(folded)]
    for colour, name in dict.fromkeys(colours):
        if name in by_name:  # the colour of an absent thing is not a second error
            yield Fact("colour", f"{colour} {name}", by_name[name].colour == colour)
    for a, side, b in dict.fromkeys(_SIDE.findall(folded)):
        if a in by_name and b in by_name:
            left, right = (a, b) if side == "left" else (b, a)
            yield Fact("side", f"{a} {side} {b}", by_name[left].column < by_name[right].column)
    for words in dict.fromkeys(_GROUNDS_RE.findall(folded)):
        yield Fact("ground", words, words == GROUNDS[scene.ground].words)
