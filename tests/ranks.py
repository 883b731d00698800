"""Ranks of one job as forks of this process: modules are imported once, not once per rank and launch."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from bpo import engine
from bpo.job import collectives
from bpo.job.launch import Ranks, ranks_from_environment, setup_logging


def fork_ranks(count: int, work: Callable[[Ranks], None]) -> None:
    """Runs `work` on `count` ranks of a new process group; exits with status 1 if a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    sys.stdout.flush()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _run_rank(rank, count, port, work)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _run_rank(rank: int, count: int, port: str, work: Callable[[Ranks], None]) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    status = 1
    try:
        ranks = ranks_from_environment()
        setup_logging(ranks)
        engine.init_distributed(ranks)
        work(ranks)
        collectives.shut_down()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
