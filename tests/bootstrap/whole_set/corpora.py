"""Corpora of records with random captions, and checks of balance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.whole_set.outcomes import plan_whole_set
from bpo.config.bootstrap import BootstrapConfig
from bpo.config.training import Config
from bpo.records import Annotation, ContentPart, Turn

OBJECTS = "dog cat horse cow sheep bird elephant bear zebra giraffe car truck bus train boat chair couch table".split()
COLOURS = "red orange yellow green blue purple brown black white grey".split()
COUNTS = "two three four five six".split()
PLACES = "on behind near above".split()


def record(number: int | str, response: str, question: str = "Describe the image.", image: str = "") -> Annotation:
    prompt = (Turn("user", (ContentPart("image"), ContentPart("text", question))),)
    return Annotation(f"r{number}", (image or f"{number}.png",), prompt, response)


def caption(draw: random.Random) -> str:
    first, second = draw.sample(OBJECTS, 2)
    rest = f"{draw.choice(PLACES)} {draw.choice(COUNTS)} {draw.choice(COLOURS)} {second}s"
    return f"A {draw.choice(COLOURS)} {first} {rest}."


def captions(num: int, seed: int = 0) -> list[Annotation]:
    draw = random.Random(seed)
    return [record(number, caption(draw)) for number in range(num)]


def config_of(**options: Any) -> Config:
    return Config(bootstrap=BootstrapConfig(**options))


def outcomes_of(
    config: Config, annotations: Sequence[Annotation], truth: ObjectTruth | None = None
) -> list[Outcome | None]:
    """The outcome of the only source for each record."""
    whole_set = plan_whole_set(config, annotations, lambda annotation: [], truth)
    found = [whole_set.of(position, annotation) for position, annotation in enumerate(annotations)]
    return [outcomes[0] if outcomes else None for outcomes in found]


def kept(annotations: Sequence[Annotation], outcomes: Sequence[Outcome | None]) -> list[tuple[Annotation, Outcome]]:
    pairs = zip(annotations, outcomes, strict=True)
    return [(annotation, outcome) for annotation, outcome in pairs if outcome and outcome.status == "kept"]


def is_balanced(pairs: Sequence[tuple[Annotation, Outcome]]) -> bool:
    preferred = Counter(annotation.response for annotation, _ in pairs)
    return preferred == Counter(outcome.text for _, outcome in pairs)
