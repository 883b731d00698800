"""Ranks, devices and logging under any launcher: deepspeed, torchrun, or SLURM's srun."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpo.job.terminal import PrintableFormatter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Ranks:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment(environ: dict[str, str] | None = None) -> Ranks:
    """Reads the ranks from the launcher's variables, or returns those of a single process.

    In this order: RANK, WORLD_SIZE, LOCAL_RANK (deepspeed, torchrun); those of mpirun (Open MPI: `deepspeed --launcher
    openmpi`); those of srun tasks (also `deepspeed --launcher slurm`).

    Raises:
        ValueError: a variable is not a number, or the rank is not below the world size.
    """
    env = dict(os.environ) if environ is None else environ
    if "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "OMPI_COMM_WORLD_RANK" in env:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "SLURM_PROCID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        # Not SLURM_NTASKS, which is also set in the batch script, where plain `python` is one process.
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Ranks()
    values = []
    for name, default in zip(names, ("0", "1", "0"), strict=True):
        text = env.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"the environment variable {name} is {text!r}; it must be a number")
        values.append(int(text))
    ranks = Ranks(*values)
    if ranks.rank >= ranks.world_size:
        raise ValueError(f"{names[0]}={ranks.rank} is not below {names[1]}={ranks.world_size}")
    return ranks


def ranks_per_node(environ: dict[str, str] | None = None) -> int | None:
    """Ranks on this node, from the launcher's variables; 1 for a single process, None if no launcher says.

    In this order: LOCAL_WORLD_SIZE (torchrun), LOCAL_SIZE (deepspeed), Open MPI's, that of srun, such as `8(x2)`.
    """
    env = dict(os.environ) if environ is None else environ
    if ranks_from_environment(env).world_size == 1:
        return 1
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    found = (re.match(r"\d+", env.get(name, "")) for name in names)
    return next((int(match.group()) for match in found if match), None)


def restart_count(environ: dict[str, str] | None = None) -> int:
    """How often SLURM has restarted this job (SLURM_RESTART_COUNT); 0 for a first start or outside SLURM."""
    env = os.environ if environ is None else environ
    text = env.get("SLURM_RESTART_COUNT", "0")
    if not text.isdecimal():
        raise ValueError(f"the environment variable SLURM_RESTART_COUNT is {text!r}; it must be a number")
    return int(text)


def own_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments without those of the deepspeed launcher; expands `--resume` to `--train.resume=true`."""
    kept = [argument for argument in argv if not argument.startswith("--local_rank")]
    return ["--train.resume=true" if argument == "--resume" else argument for argument in kept]


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[003-007,9],login` -> `gpu003`."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodelist)
    if first is None:
        raise ValueError(f"cannot read a host from the SLURM node list {nodelist!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def export_torch_environment(ranks: Ranks) -> None:
    """Sets the variables that torch.distributed reads unless the launcher did (srun sets none of them)."""
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    # The node list of the step if there is one: srun may use a subset of the job's nodes, with rank 0 on its first.
    nodelist = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    os.environ.setdefault("MASTER_ADDR", first_host(nodelist) if nodelist and ranks.world_size > 1 else "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_master_port()))


def _master_port() -> int:
    """A port that jobs on one node do not share, derived from the job id."""
    job = os.environ.get("SLURM_JOB_ID", "0")
    return 29500 + int(job) % 10000 if job.isdecimal() else 29500


def pick_device(ranks: Ranks | None = None) -> torch.device:
    """This rank's GPU, or the CPU if there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = (ranks or ranks_from_environment()).local_rank
    return torch.device("cuda", local % torch.cuda.device_count())


def setup_logging(ranks: Ranks) -> None:
    """Logs INFO on rank 0 and warnings on the others; with several ranks, each line names its rank."""
    where = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    form = f"%(asctime)s {where}%(levelname)s %(name)s: %(message)s"
    handler.setFormatter(PrintableFormatter(form, "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, handlers=[handler])
    for noisy in ("transformers", "DeepSpeed", "urllib3", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
