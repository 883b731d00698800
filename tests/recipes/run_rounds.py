"""Two rounds of every recipe of bpo/recipes/rounds/ on the demo's world, in one process: `run_rounds.py DIR`.

Starting a process costs more than a tiny stage: test_rounds.py starts this once and reads what each run wrote.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification

from bpo import engine
from bpo.bootstrap.run import run_bootstrap
from bpo.checkpoint.export import run_export
from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.evaluation.run import run_evaluation
from bpo.job import collectives
from bpo.job.launch import Ranks, setup_logging
from bpo.job.signals import StopRequest
from bpo.ranking.images import run_image_choice
from bpo.ranking.run import run_rank
from bpo.ranking.select.run import run_select
from bpo.rounds.run import run_rounds
from bpo.rounds.stages import Stage
from bpo.tools.demo.base import BaseConfig, build_base_model
from bpo.tools.demo.environment import quiet_libraries
from bpo.tools.demo.files import build_world
from bpo.tools.demo.recipe import Recipe
from bpo.tools.demo.rounds import METHODS, ONE_ROUND, DemoRounds, overlay, recipe_file, write_detections
from bpo.tools.demo.world import WorldConfig
from bpo.train import train
from tests.tiny import byte_tokenizer, save

WORLD = WorldConfig(seed=1, num_annotations=16, num_evaluation_scenes=4)
# Trained just long enough to answer in the form of the captions.
BASE = BaseConfig(
    steps=150, tower_steps=4, batch=8, tower_batch=8, tower_width=16, text_width=32, text_layers=1, learning_rate=3e-3
)
STEPS = 3
EVALUATED = ("iterated-bpo", "sapo")
PICKER = "pick_last.py"


def run_here(stage: Stage, processes: int, stop: StopRequest | None) -> int:
    """Runs a stage in this process."""
    config = load_config(["--config", str(stage.config_file)])
    if stage.name in ("train", "reference"):
        torch.manual_seed(config.train.seed)
        train(config, Ranks())
    else:
        _RUN[stage.name](config)
    return 0


_RUN: dict[str, Any] = {
    "images": run_image_choice,
    "generate": lambda config: run_bootstrap(config, progress=False),
    "judge": run_rank,
    "select": run_select,
    "export": run_export,
    "evaluate": lambda config: run_evaluation(config, progress=False),
}


def save_reward_model(folder: Path) -> None:
    """A random reward model of text."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes))
    save(folder, model.eval(), tokenizer)


def write_candidate_images(root: Path) -> None:
    """Annotations of which every other one has two images to choose from, and a program that prefers later names."""
    annotations = json.loads((root / "world" / "annotations.json").read_text())
    for number, entry in enumerate(annotations[:-1:2]):
        entry["candidate_images"] = [entry["image"], annotations[2 * number + 1]["image"]]
    (root / "candidates.json").write_text(json.dumps(annotations))
    (root / PICKER).write_text(
        "import json, re, sys\n"
        "for line in sys.stdin:\n"
        "    group = json.loads(line)\n"
        "    print(json.dumps({'id': group['id'], 'scores': [float(re.findall(r'\\d+', group['images'][0])[-1])]}))\n"
    )


def config_of(method: str, root: Path, sizes: DemoRounds, world: Any) -> Config:
    tree = overlay(method, root / "base", world, root / "runs" / method, sizes)
    tree["rounds"]["evaluate"] = method in EVALUATED
    if method == "pds-dpo":
        tree = copy.deepcopy(tree)
        tree["rank"]["options"] = {"kind": "text", "model": str(root / "reward")}
        tree["select"] = {"min_margin": 0.0}
        tree["data"]["annotations"] = str(root / "candidates.json")
        tree["rounds"] |= {"image_command": f"{sys.executable} {root / PICKER}", "each": [{}, {}]}
    path = root / f"{method}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(["--config", str(recipe_file(method)), "--config", str(path)])


def main() -> None:
    root = Path(sys.argv[1])
    quiet_libraries()
    torch.set_num_threads(1)
    world = build_world(root / "world", WORLD, progress=False)
    build_base_model(root / "base", WORLD, BASE, progress=False)
    write_detections(world)
    save_reward_model(root / "reward")
    write_candidate_images(root)
    setup_logging(Ranks())
    engine.init_distributed(Ranks())
    sizes = DemoRounds(
        recipe=Recipe(groups_per_step=4, batch_size=16), steps=STEPS, extra={"export": {"check_groups": 1}}
    )
    for method in sys.argv[2:] or [name for name in METHODS if name != ONE_ROUND]:
        run_rounds(config_of(method, root, sizes, world), run=run_here)
    collectives.shut_down()


if __name__ == "__main__":
    main()
