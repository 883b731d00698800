"""First-step gradients with layer kernels and patch embeddings as products: `layer_lever_matrix.py DIR CASE...`.

A case is that of tests/gradient_matrix.py without the number of ranks, which is 2, after `plain` or `levers`, such as
levers:qwen:3:300:selective. Writes DIR/CASE.pt. Liger is the stand-in.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import gradient_matrix
import liger_stand_in
import pytest
import torch
from ranks import fork_ranks

from bpo.job.launch import Ranks
from bpo.model import recompute
from bpo.model.levers import layer_kernels, patch_embedding
from bpo.model.levers.choice import Lever
from bpo.model.trainable import prepare_trainable


def prepare_with_levers(model: Any, family: Any, config: Any) -> None:
    prepare_trainable(model, family, config)
    patch_embedding.install(model, family, config, Lever("gemm", ""))
    layer_kernels.install(model, family, config, Lever("liger", ""))


def run(root: Path, cases: list[str], ranks: Ranks) -> None:
    recompute.CHEAP_INNER = 2  # the tiny products count as large
    for case in cases:
        kind, _, rest = case.partition(":")
        gradient_matrix.prepare_trainable = prepare_with_levers if kind == "levers" else prepare_trainable
        result = gradient_matrix.first_step(gradient_matrix.config_of(root, rest), ranks)
        if ranks.is_main:
            torch.save({name: result[name] for name in ("loss", "gradients")}, root / f"{case}.pt")


if __name__ == "__main__":
    liger_stand_in.use_stand_in(pytest.MonkeyPatch())
    fork_ranks(2, partial(run, Path(sys.argv[1]), sys.argv[2:]))
