"""First-step gradients with and without compiled layers, on two ranks: `compiled_job.py DIR CASE...`.

A case is one of tests/gradient_matrix.py, or lora: and one of tests/lora_matrix.py. Writes DIR/CASE.pt: by whether
layers were compiled, loss and gradients.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradient_matrix
import lora_matrix
import torch
from ranks import fork_ranks

from bpo.job.launch import Ranks
from bpo.model.levers import compiled
from bpo.model.levers.choice import Lever
from bpo.model.trainable import prepare_trainable


def prepare_and_compile(prepare: Any, model: Any, family: Any, config: Any) -> None:
    prepare(model, family, config)
    with_buckets = replace(config, model=replace(config.model, compile_buckets=1))
    compiled.install(model, family, with_buckets, Lever("layers", "tested"))


def run_cases(root: Path, cases: list[str], ranks: Ranks) -> None:
    compiled.BACKEND = "aot_eager"
    for case in cases:
        results = {}
        is_lora = case.startswith("lora:")
        prepare = lora_matrix.prepare if is_lora else prepare_trainable
        config = (lora_matrix if is_lora else gradient_matrix).config_of(root, case.removeprefix("lora:"))
        for is_compiled in (False, True):
            gradient_matrix.prepare_trainable = partial(prepare_and_compile, prepare) if is_compiled else prepare
            result = gradient_matrix.first_step(config, ranks)
            results[is_compiled] = {name: result[name] for name in ("loss", "gradients")}
            torch.distributed.barrier()
            if ranks.is_main:  # so that the compiled layers compute the reference, too
                shutil.rmtree(Path(config.train.output_dir) / "reference")
            torch.distributed.barrier()
        if ranks.is_main:
            torch.save(results, root / f"{case}.pt")


if __name__ == "__main__":
    fork_ranks(2, partial(run_cases, Path(sys.argv[1]), sys.argv[2:]))
