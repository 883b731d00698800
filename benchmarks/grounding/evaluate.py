"""Answers of a model on the scenes of a split, and the facts in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.grounding.data import Probe, evaluation_scenes, probes, write_images
from benchmarks.grounding.language import DESCRIBE, facts
from benchmarks.grounding.tower import register
from benchmarks.grounding.world import Scene, WorldConfig
from bpo.config.training import Config, DataConfig, EvaluationConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import Request, answer_requests
from bpo.evaluation.benchmarks.pope import says_yes
from bpo.model.load import load_model

MAX_NEW_TOKENS = 64
BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Split:
    """Scenes of an evaluation: contrary ones to describe, and as many for questions of both kinds."""

    name: str
    num_descriptions: int
    num_questioned: int


VALIDATION = Split(name="validation", num_descriptions=150, num_questioned=0)
TEST = Split(name="test", num_descriptions=400, num_questioned=100)


def evaluate(model_folder: Path, images: Path, world: WorldConfig, split: Split) -> dict[str, Any]:
    """Per scene: asserted facts and errors by kind, recall, words; per question whether the answer is right."""
    register()
    config = Config(
        model=ModelConfig(path=str(model_folder), dtype="bfloat16"), data=DataConfig(image_root=str(images))
    )
    model, encoder = load_model(config.model, torch.device("cpu")), load_encoder(config)
    scenes = evaluation_scenes(world, split.name, split.num_descriptions)
    names = write_images(images, split.name, scenes)
    asked = _probes(images, world, split, scenes, names)
    prompts = [*((name, DESCRIBE[0]) for name in names), *((probe.image, probe.text) for probe in asked)]
    requests = [Request(image=image, text=text, max_new_tokens=MAX_NEW_TOKENS) for image, text in prompts]
    journal = AnswerJournal()
    answer_requests(model, encoder, requests, journal, EvaluationConfig(batch_size=BATCH), progress=False)
    answers = journal.all([request.key for request in requests], 0.0)
    described = [_scored(text, scene) for text, scene in zip(answers, scenes, strict=False)]
    verdicts = [
        {"agrees": probe.agrees, "truth": probe.truth, "right": says_yes(text) == probe.truth}
        for text, probe in zip(answers[len(scenes) :], asked, strict=True)
    ]
    return {"split": split.name, "descriptions": described, "questions": verdicts}


def _probes(images: Path, world: WorldConfig, split: Split, scenes: list[Scene], names: list[str]) -> list[Probe]:
    count = split.num_questioned
    if not count:
        return []
    usual = evaluation_scenes(world, f"{split.name}-usual", count, contrary=False)
    usual_names = write_images(images, f"{split.name}-usual", usual)
    return [
        *probes(world, split.name, scenes[:count], names[:count], agrees=False),
        *probes(world, f"{split.name}-usual", usual, usual_names, agrees=True),
    ]


def _scored(text: str, scene: Scene) -> dict[str, Any]:
    asserted, wrong = Counter[str](), Counter[str]()
    named = set()
    for fact in facts(text, scene):
        asserted[fact.kind] += 1
        wrong[fact.kind] += not fact.holds
        if fact.kind == "object" and fact.holds:
            named.add(fact.words)
    return {
        "text": text,
        "asserted": dict(asserted),
        "wrong": {kind: count for kind, count in wrong.items() if count},
        "recall": len(named) / len(scene.placed),
        "words": len(text.split()),
    }


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Rates of one evaluation.

    wrong: wrong facts over all facts that the descriptions assert; chair_i, chair_s: the objects among them;
    wrong_colour, wrong_side, wrong_ground: the others; recall; words; yes_no_agrees, yes_no_contradicts: accuracy on
    questions whose answers agree with the priors or contradict them.
    """
    described = result["descriptions"]
    asserted: Counter[str] = sum((Counter(d["asserted"]) for d in described), Counter())
    wrong: Counter[str] = sum((Counter(d["wrong"]) for d in described), Counter())

    def rate(kind: str) -> float:
        return wrong[kind] / max(asserted[kind], 1)

    rates = {
        "wrong": wrong.total() / max(asserted.total(), 1),
        "chair_i": rate("object"),
        "chair_s": sum("object" in d["wrong"] for d in described) / len(described),
        **{f"wrong_{kind}": rate(kind) for kind in ("colour", "side", "ground")},
        "recall": sum(d["recall"] for d in described) / len(described),
        "words": sum(d["words"] for d in described) / len(described),
    }
    for agrees, name in ((True, "yes_no_agrees"), (False, "yes_no_contradicts")):
        rights = [q["right"] for q in result["questions"] if q["agrees"] == agrees]
        if rights:
            rates[name] = sum(rights) / len(rights)
    return rates
