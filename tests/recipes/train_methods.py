"""Two steps with every recipe of bpo/recipes/methods/ on the demo's world, in one process: `train_methods.py DIR`.

Starting a process costs more than a tiny run: test_methods.py starts this once and reads what each run wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bpo import engine
from bpo.checkpoint.files import latest_valid
from bpo.checkpoint.shards import ShardSet
from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.job import collectives
from bpo.job.launch import Ranks, setup_logging
from bpo.losses.program import LossProgram
from bpo.tools.demo.base import BaseConfig, build_base_model
from bpo.tools.demo.environment import quiet_libraries
from bpo.tools.demo.files import build_world
from bpo.tools.demo.methods import MethodGroups, data_of, write_method_groups
from bpo.tools.demo.world import WorldConfig
from bpo.train import train
from tests.demo_groups import write_bootstrapped

RECIPES = Path(__file__).resolve().parents[2] / "bpo" / "recipes" / "methods"
WORLD = WorldConfig(seed=1, num_annotations=12, num_evaluation_scenes=1)
# Untrained: the first loss is at policy = reference whatever the model.
BASE = BaseConfig(steps=1, tower_steps=1, batch=4, tower_batch=4, tower_width=16, text_width=32, text_layers=1)
STEPS, GROUPS_PER_STEP = 2, 4


def config_of(recipe: Path, root: Path, groups: MethodGroups) -> Config:
    """The recipe as it is, on the small model and data; a learning rate at which two steps can be seen."""
    data = data_of(recipe.stem)
    options = {
        "model.path": root / "base",
        "model.dtype": "float32",
        "data.groups": data.path(groups),
        "data.image_root": root / "world" / "images",
        "data.num_workers": 0,
        "train.output_dir": root / "runs" / recipe.stem,
        "train.ds_config": "ds_configs/zero1.json",
        "train.completion_types": json.dumps(list(data.completion_types)),
        "train.max_steps": STEPS,
        "train.groups_per_step": GROUPS_PER_STEP,
        "train.lr": 1e-3,
        "train.tensorboard": "false",
        "train.hang_timeout_seconds": 0,
    }
    return load_config(["--config", str(recipe), *(f"--{name}={value}" for name, value in options.items())])


def largest_change(output: Path) -> float:
    """Largest entry of the adapters' second matrices, which start at 0."""
    checkpoint, manifest = latest_valid(output)
    files = [name for name in manifest["files"] if name.endswith(".safetensors")]
    trained = ShardSet(checkpoint, files).parameters()
    return max(float(tensor.abs().max()) for name, tensor in trained if "lora_B" in name)


def main() -> None:
    root = Path(sys.argv[1])
    quiet_libraries()
    torch.set_num_threads(1)
    build_world(root / "world", WORLD, progress=False)
    build_base_model(root / "base", WORLD, BASE, progress=False)
    groups = write_method_groups(write_bootstrapped(root / "groups.jsonl", WORLD), root / "groups", WORLD)
    ranks = Ranks()
    setup_logging(ranks)
    engine.init_distributed(ranks)
    found = {}
    for recipe in sorted(RECIPES.glob("*.yaml")):
        config = config_of(recipe, root, groups)
        torch.manual_seed(config.train.seed)
        train(config, ranks)
        terms = LossProgram(config.loss).names
        found[recipe.stem] = {"terms": terms, "change": largest_change(Path(config.train.output_dir))}
    (root / "found.json").write_text(json.dumps(found))
    collectives.shut_down()


if __name__ == "__main__":
    main()
