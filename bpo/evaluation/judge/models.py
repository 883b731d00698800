"""The models to judge: their names, and their answers to one benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.given_answers import read_answers
from bpo.evaluation.suite import Suite

BASE = "base"


def read_models(base: str, answers: Sequence[str], benchmark: Benchmark) -> dict[str, list[str]]:
    """Name -> answers in the order of the questions, the base first.

    Args:
        base: File of the base's answers.
        answers: FILE or NAME=FILE of each other model; FILE is named by its stem.

    Raises:
        ValueError: `base` is empty, two models have the same name, or a file does not answer every question once.
    """
    if not base:
        raise ValueError(
            "judge.base is empty; give the answers of the base model. It is judged together with the others, since "
            "scores of another judge, or of the same judge at another time, are not comparable"
        )
    paths = {BASE: Path(base)}
    for entry in answers:
        name, _, file = entry.rpartition("=")
        name = name or Path(file).stem
        if name in paths:
            raise ValueError(f"judge.answers: two models are named {name!r}; write NAME=FILE")
        paths[name] = Path(file)
    suite = Suite("judge", (benchmark,))
    return {name: read_answers(path, suite, skip_others=True)[0] for name, path in paths.items()}
