"""One rank of a job of any launcher: waits for the others, writes DIR/rank-N.json. See test_launch_two_nodes.py."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bpo.job.launch import export_torch_environment, own_arguments, ranks_from_environment
from bpo.job.rendezvous import meet

if __name__ == "__main__":
    ranks = ranks_from_environment()
    export_torch_environment(ranks)
    timeout = timedelta(seconds=120)
    store = meet(ranks, timeout)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    total = torch.tensor(float(ranks.rank + 1))
    dist.all_reduce(total)
    folder, *arguments = own_arguments(sys.argv[1:])
    found = asdict(ranks) | {"sum": total.item(), "arguments": arguments, "master": os.environ["MASTER_ADDR"]}
    (Path(folder) / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
