"""A run directory with a checkpoint whose trainable parameters were moved at random, which exports like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bpo.checkpoint.compatible import WEIGHTS, base_digest, base_files
from bpo.checkpoint.files import commit, seal_file, step_dir
from bpo.checkpoint.shards import KINDS, Fragment, Shard, shard_name
from bpo.config.io import to_tree
from bpo.config.training import Config, DataConfig, LoraConfig
from bpo.data.families import family_of
from bpo.formats.schema import group_to_json
from bpo.model.load import load_model
from bpo.model.reference.fingerprint import model_fingerprint
from bpo.model.trainable import prepare_trainable
from tests.sample_groups import three_groups

LORA = LoraConfig(r=4, alpha=8, dropout=0.1)


def perturbed(config: Config, scale: float = 0.3, only: str = "") -> Any:
    """The prepared model with every trainable parameter moved, or those with `only` in their name."""
    model = load_model(config.model)
    prepare_trainable(model, family_of(model.config), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and only in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def write_checkpoint(run: Path, model: Any, config: Config, step: int = 3) -> Path:
    """As one rank of a training run would have written it."""
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.float().flatten() for p in named.values()])
    fragments, at = [], 0
    for name, p in named.items():
        fragments.append(Fragment(name, tuple(p.shape), str(p.dtype)[6:], 0, p.numel(), 0, at))
        at += p.numel()
    shard = Shard(fragments, 3, {f"{kind}.0": flat.clone() for kind in KINDS})
    final = step_dir(run, step)
    temporary = final.with_suffix(".tmp")
    temporary.mkdir(parents=True)
    shard.write(temporary / shard_name(0))
    files = {shard_name(0): seal_file(temporary / shard_name(0))}
    base = base_files(model_fingerprint(config.model.path))
    written = {"step": step, "world_size": 1, "config": to_tree(config), "base": base, "files": files}
    commit(temporary, final, {**written, "fingerprints": {WEIGHTS: base_digest(base)}})
    return final


def write_groups(path: Path, photo_root: Path) -> DataConfig:
    """Three groups about the pictures in `photo_root`, as data options."""
    path.write_text("".join(json.dumps(group_to_json(group)) + "\n" for group in three_groups()))
    return DataConfig(groups=str(path), image_root=str(photo_root))
