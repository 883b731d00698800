"""Rounds on the demo's world: what the recipes of bpo/recipes/rounds/ need there, as a second configuration file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from bpo.job.durable import write_durably
from bpo.tools.demo.files import World
from bpo.tools.demo.recipe import Recipe
from bpo.tools.demo.rewriting import prompt_dir
from bpo.tools.demo.world import sample_scene

ONE_ROUND = "bpo-one-round"
_CLAIMS = {"judge": "claims", "options": {"split": "objects", "question": "Is there {claim} in the image?"}}
_NLL = {"type": "nll"}  # losses with terms bring the demo's likelihood term themselves
# The seed pairs of SPA: annotations against answers to noised images.
_SEED = {
    "bootstrap": {"sources": ["weaken"]},
    "rank": {"judge": "", "options": {}},
    "select": {"rule": "all", "annotation": "rank"},
    "loss": {"type": "sigmoid", "options": {}},
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A recipe on the demo's world.

    Attributes:
        recipe: Name of the recipe; empty if it is the method's.
        options: Options by section.
        each: The rounds; by default two, each with half of the annotations.
        steps: Training steps of a round, in units of `DemoRounds.steps`.
    """

    recipe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    each: tuple[Mapping[str, Any], ...] = ({"part": "1/2"}, {"part": "2/2"})
    steps: int = 1


METHODS: dict[str, Method] = {
    ONE_ROUND: Method(recipe="iterated-bpo", each=({"part": "1/1"},), steps=2),
    "iterated-bpo": Method(),
    "sapo": Method(options={"online": {"ema_decay": 0.5, "reference_every_steps": 16}}),
    "selm": Method(
        options={
            "rank": _CLAIMS,
            "loss": {
                "terms": [
                    {"type": "sigmoid"},
                    {"type": "log_ratio", "name": "optimism", "pairs": "explored", "weight": 1e-3},
                    _NLL,
                ]
            },
        }
    ),
    "spa": Method(
        options={
            "rank": {"judge": "implicit", "options": {"beta": 0.5}},
            "trainable": {"lm_head": "frozen"},
            "loss": {"options": {"alpha": 0.1, "warmup_share": 0.2, "extrapolation": 0.5}},
        },
        each=({"part": "1/2", "options": _SEED}, {"part": "2/2"}),
    ),
    "rlaif-v": Method(options={"rank": _CLAIMS}),
    "chair-dpo": Method(),
    "finesumfact": Method(
        options={"loss": {"terms": [{"type": "sigmoid", "token_weights": "data", "length": "mean"}, _NLL]}}
    ),
    "pds-dpo": Method(),
}


@dataclass(frozen=True, kw_only=True)
class DemoRounds:
    """Sizes of the rounds; `recipe` has the demo's.

    Attributes:
        steps: Training steps of a round.
        extra: Options by section that override all others.
    """

    recipe: Recipe = Recipe()
    steps: int = 46
    extra: Mapping[str, Any] = field(default_factory=dict)


def recipe_file(method: str) -> Path:
    """The recipe of a method of `METHODS`."""
    with as_file(files("bpo").joinpath(f"recipes/rounds/{METHODS[method].recipe or method}.yaml")) as path:
        return Path(path)


def overlay(method: str, base: Path, world: World, output: Path, sizes: DemoRounds) -> dict[str, Any]:
    """The options that follow those of the recipe: model, data, sizes and the demo's optimisation.

    Args:
        method: Key of `METHODS`. `pds-dpo` also needs a reward model: rank.options.model of `sizes.extra`.
        base: The base model.
        output: Folder of the rounds.
    """
    recipe, own = sizes.recipe, METHODS[method]
    tokens = recipe.max_new_tokens
    tree: dict[str, Any] = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"annotations": str(world.annotations), "image_root": str(world.images), "num_workers": 0},
        "bootstrap": {
            "batch_size": recipe.batch_size,
            "weaken": {"noise_step": recipe.noise_step, "max_new_tokens": tokens},
            "inject": {"mode": "description", "prompt_dir": prompt_dir(), "max_new_tokens": tokens},
            "sample": {"count": 8, "temperature": 1.0, "max_new_tokens": tokens},
            "segment": {"max_tokens": 8, "temperature": 1.0},
        },
        "rank": {"batch_size": 64},
        "trainable": {"language": "full"},
        "loss": {"beta": recipe.beta},
        "train": {
            "ds_config": "ds_configs/zero1.json",
            "epochs": 1000,  # max_steps ends the round
            "max_steps": own.steps * sizes.steps,
            "groups_per_step": recipe.groups_per_step,
            "lr": recipe.lr,
            "lr_schedule": "constant",  # every round continues at the rate at which the one before ended
            "tensorboard": False,
        },
        "evaluation": {"suite": str(world.suite), "batch_size": recipe.batch_size, "synonyms": str(world.synonyms)},
        "rounds": {"output_dir": str(output), "evaluate": True, "each": [dict(one) for one in own.each]},
    }
    if method == "chair-dpo":
        tree["rank"]["options"] = {"score": "rate", "detections": str(detections_of(world))}
    _merge(tree, own.options)
    if "terms" not in tree["loss"]:
        tree["loss"]["chosen_nll_weight"] = recipe.chosen_nll_weight
    _merge(tree, sizes.extra)
    return tree


def detections_of(world: World) -> Path:
    """The file of `write_detections`."""
    return world.root / "detections.jsonl"


def write_detections(world: World) -> None:
    """The objects of all annotated scenes, as a detector without errors would list them."""
    lines = []
    for index in range(world.config.num_annotations):
        scene = sample_scene(world.config, "annotations", index)
        lines.append(json.dumps({"image": f"train_{index:06d}.png", "objects": list(scene.names)}))
    write_durably(detections_of(world), "\n".join(lines) + "\n")


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for section, options in changes.items():
        tree[section] = {**tree.get(section, {}), **copy.deepcopy(dict(options))}
