"""Sets of preference pairs whose measures are known in closed form."""

from __future__ import annotations

import random

from bpo.bootstrap.measure.pairs import TextPair

OBJECTS = "dog cat bus car tree bench bird horse cow boat plane train clock vase cup fork knife bed sofa kite".split()
COLOURS = "red blue green black white".split()
PLACES = "near behind under above".split()


def caption(draw: random.Random) -> str:
    first, second = draw.choice(OBJECTS[:10]), draw.choice(OBJECTS[10:])
    return f"A {draw.choice(COLOURS)} {first} is {draw.choice(PLACES)} the {draw.choice(COLOURS)} {second}."


def independent(num: int, seed: int = 0) -> list[TextPair]:
    """Both answers from the same distribution."""
    draw = random.Random(seed)
    return [TextPair(f"r{i}", caption(draw), caption(draw)) for i in range(num)]


def swapped(num: int, seed: int = 0) -> list[TextPair]:
    """The rejected answers are the preferred ones, permuted in one cycle; each text is unique."""
    draw = random.Random(seed)
    texts = [f"{caption(draw)} {_name(i)}" for i in range(num)]
    order = list(range(num))
    draw.shuffle(order)
    after = {order[i]: order[(i + 1) % num] for i in range(num)}
    return [TextPair(f"r{i}", texts[i], texts[after[i]]) for i in range(num)]


def exchanged(num: int, seed: int = 0) -> list[TextPair]:
    """The first object is replaced by that of another record, permuted: each is put in as often as taken out."""
    draw = random.Random(seed)
    texts = [caption(draw).split() for _ in range(num)]
    order = list(range(num))
    draw.shuffle(order)
    rejected = [[*text[:2], texts[other][2], *text[3:]] for text, other in zip(texts, order, strict=True)]
    pairs = [TextPair(f"r{i}", " ".join(a), " ".join(b)) for i, (a, b) in enumerate(zip(texts, rejected, strict=True))]
    return [pair for pair in pairs if pair.preferred != pair.rejected]


def telling(num: int, share: float, seed: int = 0) -> list[TextPair]:
    """`share` of the rejected answers end with a word that no preferred answer has."""
    draw = random.Random(seed)
    return [
        TextPair(f"r{i}", caption(draw), caption(draw) + (" Perhaps" if draw.random() < share else ""))
        for i in range(num)
    ]


def _name(number: int) -> str:
    return "x" + "".join(chr(ord("a") + int(digit)) for digit in str(number))
