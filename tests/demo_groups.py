"""Groups of the demo's world as `bpo bootstrap` writes them, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bpo.formats.schema import group_to_json
from bpo.job.journal import to_line
from bpo.records import Completion, ContentPart, PreferenceGroup, Turn
from bpo.tools.demo.rewriting import rewriting_turn
from bpo.tools.demo.world import DESCRIBE, WorldConfig, iter_scenes

PROMPT = (Turn("user", (ContentPart("image"), ContentPart("text", DESCRIBE))),)


def write_bootstrapped(path: Path, world: WorldConfig) -> Path:
    """Per annotation the annotation itself and three answers with a wrong object each."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for index, scene in enumerate(iter_scenes(world, "annotations", world.num_annotations)):
            wrong = {kind: rewriting_turn(scene.objects, rng)[1] for kind in ("mllm-hal", "mllm-self", "llm-hal")}
            answers = [Completion(text, 0.0, kind) for kind, text in wrong.items()]
            completions = (Completion(scene.caption, 1.0, "gt"), *answers)
            name = f"train_{index:06d}"
            file.write(to_line(group_to_json(PreferenceGroup(name, (f"{name}.png",), PROMPT, completions))))
    return path
