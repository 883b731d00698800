"""Text-only training data for rewriting a caption with plausible errors.

The language model of a real MLLM can do this from its instruction tuning. The demo's tiny language model is trained for
it on pairs of a caption and an erroneous version, without images.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np
import yaml

from .sprites import NAMES, NUM_OBJECTS, companions
from .world import caption_of

ADD_PROBABILITY = 0.2
COMMON_PROBABILITY = 0.9


def prompt_dir() -> str:
    """The folder of the demo's injection prompt, for `bootstrap.inject.prompt_dir`."""
    with as_file(files("bpo.tools.demo").joinpath("prompts")) as path:
        return str(path)


@cache
def _prompt() -> dict[str, str]:
    tree: dict[str, str] = yaml.safe_load(
        files("bpo.tools.demo").joinpath("prompts/description.yaml").read_text(encoding="utf-8")
    )
    return tree


def rewriting_request(caption: str) -> str:
    """The user's turn that requests an erroneous version of `caption`, identical to that of bootstrapping."""
    prompt = _prompt()
    return f"{prompt['instruction'].strip()}\n\n{prompt['request'].replace('{description}', caption)}"


def rewriting_turn(objects: tuple[int, ...], rng: np.random.Generator) -> tuple[str, str]:
    """(request, answer): the answer adds an absent object, usually a companion, or substitutes it for a present one."""
    mates = sorted({mate for thing in objects for mate in companions(thing)} - set(objects))
    absent = [i for i in range(NUM_OBJECTS) if i not in objects]
    wrong = int(rng.choice(mates if mates and rng.random() < COMMON_PROBABILITY else absent))
    kept = list(objects)
    if len(kept) > 1 and rng.random() >= ADD_PROBABILITY:
        kept.pop(int(rng.integers(len(kept))))
    answer = caption_of([NAMES[i] for i in sorted([*kept, wrong])])
    return rewriting_request(caption_of([NAMES[i] for i in objects])), answer
