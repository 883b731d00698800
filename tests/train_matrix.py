"""Many small training runs on two ranks, then some of them continued by one and by four: `train_matrix.py DIR`.

Starting a process costs more than a tiny run: test_train.py starts this once and reads the metrics of every case.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from ranks import fork_ranks
from safetensors.torch import load_file, save_file

from bpo.checkpoint.files import CheckpointError
from bpo.config.loss import TermConfig, ViewConfig
from bpo.config.training import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.load import load_model
from bpo.train import train
from bpo.training import step as training
from bpo.training.agreement import RanksDifferError
from bpo.training.checks import NonFiniteError
from bpo.training.metrics import StepSums

# Runs that end after step 4 and are continued by the same number of ranks; bfloat16 is one of ZeRO-3 with LoRA.
RESUMED = ("zero1", "zero2", "zero2_offload", "zero3_offload", "full_zero1", "full_zero3", "bfloat16", "dropout")
# The same for losses with a state, across groups, with views and second targets, and without a reference.
STATEFUL = {"mpo": "bco_pair", "spa": "spa"}
RESUMED += (*STATEFUL, "rpo", "orpo")
# Images that change after the first step of the run `lost`.
LOST = {"deleted": ["3.png", "4.png"], "cut": ["8.png"], "replaced": ["12.png"]}
# Written by two ranks, continued by one and by four.
FROM_TWO = {1: ("zero3_offload", "full_zero1", "mpo"), 4: ("full_zero3", "bfloat16", "spa", "rpo")}

LOSSES = {
    "mpo": LossConfig(
        terms=[TermConfig(weight=0.8), TermConfig(type="bco_pair", weight=0.2), TermConfig(type="nll")],
    ),
    # Six pairs per step: the window holds the latest margins of one step and some of the one before it.
    "spa": LossConfig(type="spa", options={"window": 8, "alpha": 0.4, "quantile": 0.4, "extrapolation": 0.5}),
    "rpo": LossConfig(
        terms=[
            TermConfig(type="rpo_diagonal"),
            TermConfig(name="image", pairs="image", against="crop", weight=0.5),
            TermConfig(name="second", pairs="argmax", against="noise", weight=0.5),
        ],
        views={"crop": ViewConfig(type="crop"), "noise": ViewConfig(type="noise")},
    ),
    "orpo": LossConfig(terms=[TermConfig(type="nll"), TermConfig(type="orpo", weight=0.2)]),
}
PLUGIN = """\
from bpo.losses.plugin import register_loss


@register_loss("squared_hinge")
def squared_hinge(values):
    return (1 - values.delta_P).clamp(min=0) ** 2
"""


def base_config(root: Path, name: str, ds_config: str = "zero2", **train_options) -> Config:
    options = {
        "epochs": 2,
        "groups_per_step": 4,
        "max_micro_batch_tokens": 300,
        "lr": 5e-3,
        "save_every_steps": 4,
        "hang_timeout_seconds": 120.0,
    }
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        lora=LoraConfig(r=4, alpha=8, dropout=0.0),
        loss=LossConfig(chosen_nll_weight=0.1),
        train=TrainConfig(
            output_dir=str(root / name),
            ds_config=f"ds_configs/{ds_config}.json",
            tensorboard=False,
            **{**options, **train_options},
        ),
    )


def cases(root: Path) -> dict[str, Config]:
    named = {
        mode: base_config(root, mode, mode) for mode in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    }
    named["small_micro_batches"] = base_config(root, "small_micro_batches", "zero2", max_micro_batch_tokens=1)
    full = TrainableConfig(language="full", vision="full")
    for mode in ("zero1", "zero3"):
        named[f"full_{mode}"] = replace(base_config(root, f"full_{mode}", mode), trainable=full)
    qwen = base_config(root, "qwen", "zero2")
    named["qwen"] = replace(qwen, model=replace(qwen.model, path=str(root / "qwen"), gradient_checkpointing=True))
    half = base_config(root, "bfloat16", "zero3", save_in_background=False)
    named["bfloat16"] = replace(half, model=replace(half.model, dtype="bfloat16"))
    dropout = base_config(root, "dropout", "zero2")
    named["dropout"] = replace(dropout, lora=LoraConfig(r=4, alpha=8, dropout=0.2))
    for name, loss in LOSSES.items():
        named[name] = replace(base_config(root, name, "zero3" if name == "rpo" else "zero2"), loss=loss)
    return named


def plugin_config(root: Path, name: str) -> Config:
    """A run that finds its loss in a file of the working directory."""
    return replace(base_config(root, name), loss=LossConfig(type="squared_hinge", plugin="my_loss.py"))


def after_step_4(root: Path, case: str, config: Config, ranks: Ranks, name: str = "") -> Config:
    """Continues a case's run in the state that a kill after step 4 would have left."""
    name = name or f"resumed_{case}"
    if ranks.is_main:
        shutil.copytree(root / case, root / name)
        shutil.rmtree(root / name / "checkpoints" / "step-00000008")
    collectives.barrier()
    return replace(config, train=replace(config.train, output_dir=str(root / name), resume=True))


def run_cases(root: Path, ranks: Ranks) -> None:
    named = cases(root)
    for config in named.values():
        train(config, ranks)
    for case in RESUMED:
        train(after_step_4(root, case, named[case], ranks), ranks)
    try:
        train(named["zero2"], ranks)
    except CheckpointError as error:
        (root / f"again.{ranks.rank}.json").write_text(json.dumps(str(error)))
    try:
        # A rate this high overflows fp32 within a few steps; all ranks must stop together and report the groups.
        train(base_config(root, "diverges", "zero2", lr=1e30, max_grad_norm=0.0), ranks)
    except NonFiniteError as error:
        (root / f"diverges.{ranks.rank}.json").write_text(json.dumps(str(error)))
    try:
        train(base_config(root, "ranks_differ", "zero3", lr=5e-3 * (1 + ranks.rank)), ranks)
    except RanksDifferError as error:
        (root / f"ranks_differ.{ranks.rank}.json").write_text(json.dumps(str(error)))
    lose_images(root, ranks)
    try:
        train(with_damaged_weight(root, ranks), ranks)
    except NonFiniteError as error:
        (root / f"damaged_weight.{ranks.rank}.json").write_text(json.dumps(str(error)))
    os.chdir(root / "node0")  # last: the other cases have paths relative to the clone
    train(plugin_config(root, "plugin"), ranks)


def with_damaged_weight(root: Path, ranks: Ranks) -> Config:
    """A base model with one NaN, of which under ZeRO-3 one rank has the part."""
    model = root / "damaged"
    if ranks.is_main:
        shutil.copytree(root / "llava", model)
        tensors = load_file(model / "model.safetensors")
        next(tensor for name, tensor in tensors.items() if name.endswith("layers.1.mlp.up_proj.weight"))[-1, -1] = (
            torch.nan
        )
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    collectives.barrier()
    config = base_config(root, "damaged_weight", "zero3")
    return replace(config, model=replace(config.model, path=str(model)))


def lose_images(root: Path, ranks: Ranks) -> None:
    """Under ZeRO-3, where every rank must run every layer: images that are deleted, cut and replaced after a step."""
    images = root / "changing_images"
    if ranks.is_main:
        shutil.copytree(root / "images", images)
    collectives.barrier()
    config = base_config(root, "lost", "zero3")
    config.data = replace(config.data, image_root=str(images), on_bad="quarantine", max_bad_share=0.5)

    def run_step(*arguments) -> StepSums:
        sums = training.run_step(*arguments)
        if ranks.is_main and arguments[4] == 0:  # the index of the step
            for deleted in LOST["deleted"]:
                (images / deleted).unlink()
            for cut in LOST["cut"]:
                (images / cut).write_bytes((images / cut).read_bytes()[:-50])
            for replaced in LOST["replaced"]:
                shutil.copy(images / "15.png", images / replaced)
        collectives.barrier()
        return sums

    with mock.patch("bpo.train.run_step", run_step):
        train(config, ranks)
    train(after_step_4(root, "lost", config, ranks), ranks)


def change_ranks(root: Path, ranks: Ranks) -> None:
    named = cases(root)
    for case in FROM_TWO[ranks.world_size]:
        train(after_step_4(root, case, named[case], ranks, f"{case}_by_{ranks.world_size}"), ranks)
    alone = base_config(root, "alone", "zero2")
    if ranks.world_size == 1:
        train(alone, ranks)
        # Another number of ranks and another ZeRO stage.
        config = after_step_4(root, "zero2", named["zero2"], ranks, "zero2_by_zero3")
        train(replace(config, train=replace(config.train, ds_config="ds_configs/zero3.json")), ranks)
        changed_plugin(root, ranks)
    else:
        train(after_step_4(root, "alone", alone, ranks, "alone_by_4"), ranks)
        # Two nodes of two ranks, each with a copy of the weights, which a checkpoint replaces.
        config = after_step_4(root, "full_zero3", named["full_zero3"], ranks, "full_zero3_by_hpz")
        with mock.patch.dict(os.environ, LOCAL_SIZE="2"):
            train(replace(config, train=replace(config.train, ds_config="ds_configs/zero3_hpz.json")), ranks)
        plugins_differ(root, ranks)


def changed_plugin(root: Path, ranks: Ranks) -> None:
    """The run `plugin` after its file has changed: refused, then continued as the user wishes."""
    config = after_step_4(root, "plugin", plugin_config(root, "plugin"), ranks, "plugin_changed")
    os.chdir(root / "node1")
    try:
        train(config, ranks)
    except CheckpointError as error:
        (root / "plugin_changed.json").write_text(json.dumps(str(error)))
    train(replace(config, train=replace(config.train, accept_changes=["plugin"])), ranks)


def plugins_differ(root: Path, ranks: Ranks) -> None:
    """The same command on two nodes whose files differ."""
    os.chdir(root / f"node{ranks.rank % 2}")
    try:
        train(plugin_config(root, "plugins_differ"), ranks)
    except RanksDifferError as error:
        (root / f"plugins_differ.{ranks.rank}.json").write_text(json.dumps(str(error)))


def main() -> None:
    root = Path(sys.argv[1])
    for number, source in enumerate((PLUGIN, PLUGIN.replace("1 -", "2 -"))):
        (root / f"node{number}").mkdir()
        (root / f"node{number}" / "my_loss.py").write_text(source)
    load_model(cases(root)["zero2"].model, for_training=True)  # imports what all ranks need
    fork_ranks(2, partial(run_cases, root))
    for count in FROM_TWO:
        fork_ranks(count, partial(change_ranks, root))


if __name__ == "__main__":
    main()
