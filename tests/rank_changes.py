"""Continues the 2-rank runs of train_matrix.py with other numbers of ranks, in one process group:

deepspeed --num_accelerators N tests/rank_changes.py DIR
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from train_matrix import after_step_4, base_config, cases

from bpo import engine
from bpo.job import collectives
from bpo.job.launch import ranks_from_environment, setup_logging
from bpo.train import train

# Written by 2 ranks, continued by 1 and by 4; more ranks would only take longer.
FROM_TWO = {1: ("zero2", "zero3_offload", "full_zero1"), 4: ("zero3", "full_zero3", "bfloat16")}


def main() -> None:
    root = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    ranks = ranks_from_environment()
    setup_logging(ranks)
    engine.init_distributed(ranks)
    if ranks.world_size == 2:
        for case in ("alone_zero2", "alone_zero3"):
            config = base_config(root, case, case.removeprefix("alone_"))
            train(after_step_4(root, case, config, ranks, f"{case}_by_2"), ranks)
    else:
        named = cases(root)
        for case in FROM_TWO[ranks.world_size]:
            train(after_step_4(root, case, named[case], ranks, f"{case}_by_{ranks.world_size}"), ranks)
    if ranks.world_size == 1:
        for mode in ("zero2", "zero3"):
            train(base_config(root, f"alone_{mode}", mode), ranks)
        # ... and by another ZeRO stage.
        config = after_step_4(root, "zero2", named["zero2"], ranks, "zero2_by_zero3")
        train(replace(config, train=replace(config.train, ds_config="ds_configs/zero3.json")), ranks)
    collectives.shut_down()


if __name__ == "__main__":
    main()
