"""Where the ranks of a job meet before torch connects them. Waits can be interrupted and name what is missing.

    one process      a store in memory; nothing listens
    one host         rank 0 listens on the loopback interface, which gloo and NCCL then use as well
    several hosts    rank 0 listens on all interfaces, at MASTER_ADDR:MASTER_PORT
    torchrun         all ranks use the store of its agent

None of these stores asks for a password: see "Who can reach a running job" in docs/cluster.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from bpo.job.exits import JobError
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest

logger = logging.getLogger(__name__)

NAME_AFTER_S = 30.0
_POLL_S = 0.1
# Of the rendezvous and of collectives. Ranks take different times to measure or hash their shares; the watchdog, not
# this, ends a job that lost a rank.
_TIMEOUT_MINUTES = 60

# Of this process, for naming late ranks: where it met the others, and how many waits it has come to.
_store: dist.Store | None = None
_arrivals = 0


class RendezvousError(JobError):
    """The ranks do not find each other; names who or what is missing."""


def meet(ranks: Ranks, timeout: timedelta, stop: StopRequest | None = None) -> dist.Store:
    """Returns a store that all ranks have joined.

    Raises:
        RendezvousError: the port is in use, rank 0 cannot be reached, or a rank does not come before `timeout`.
        ValueError: MASTER_PORT is not a port.
        Interrupted: `stop` was received meanwhile.
    """
    global _store
    address = os.environ["MASTER_ADDR"]
    local = ranks.world_size == 1 or is_on_one_host(ranks, address)
    if local:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    if ranks.world_size == 1:
        return dist.HashStore()
    port = master_port()
    from_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if local and not from_agent:
        address = "127.0.0.1"
    wait = _Wait(timeout, stop)
    if ranks.is_main and not from_agent:
        listener = _listen(address if local else "", port)
        store = dist.TCPStore(
            address, port, ranks.world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    else:
        _reach(address, port, wait)
        store = dist.TCPStore(address, port, ranks.world_size, False, timeout, wait_for_workers=False)
    joined = dist.PrefixStore(f"bpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    _join(joined, ranks, wait)
    _store = joined
    return joined


def collective_timeout() -> timedelta:
    """DEEPSPEED_TIMEOUT, in minutes.

    Raises:
        ValueError: it is not a positive number.
    """
    text = os.environ.get("DEEPSPEED_TIMEOUT", str(_TIMEOUT_MINUTES))
    if not text.isdecimal() or not int(text):
        raise ValueError(f"the environment variable DEEPSPEED_TIMEOUT is {text!r}; it must be a number of minutes")
    return timedelta(minutes=int(text))


def master_port() -> int:
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ValueError(f"the environment variable MASTER_PORT is {text!r}; it must be a number below 65536")
    return int(text)


def is_on_one_host(ranks: Ranks, address: str) -> bool:
    """Whether all ranks run on this host, from the launcher's variables and the address at which they meet."""
    if address == "localhost" or address == "::1" or address.startswith("127."):
        return True
    counts = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, deepspeed, Open MPI
    if any(os.environ.get(name) == str(ranks.world_size) for name in counts):
        return True
    # Not within torchrun, which srun may start in one step per node.
    is_step = os.environ.get("SLURM_STEP_NUM_TASKS") == str(ranks.world_size)
    return is_step and os.environ.get("SLURM_STEP_NUM_NODES") == "1"


@contextlib.contextmanager
def named_wait(ranks: Ranks) -> Iterator[None]:
    """Logs once, after `NAME_AFTER_S`, which ranks have not come to the same wait; entered in the same order by all."""
    global _arrivals
    if _store is None:
        yield
        return
    _arrivals += 1
    _store.set(f"arrivals/{ranks.rank}", str(_arrivals))
    timer = threading.Timer(NAME_AFTER_S, _name_late_ranks, (_store, ranks, _arrivals))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _name_late_ranks(store: dist.Store, ranks: Ranks, arrivals: int) -> None:
    everyone = range(ranks.world_size)
    late = [rank for rank in everyone if _number(store, f"arrivals/{rank}") < arrivals]
    if ranks.rank != min(set(everyone) - set(late)):
        return  # one rank tells
    if late:
        others = f" and {len(late) - 1} others" if len(late) > 1 else ""
        what = f"{_name(store, late[0])}{others}; see its log. If it no longer runs, stop this job and start it again"
    else:
        what = "the network between the ranks, of which all have come; see GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    logger.warning("waiting for %.0f s: %s", NAME_AFTER_S, what)


def _number(store: dist.Store, key: str) -> int:
    return int(store.get(key)) if store.check([key]) else 0


def _name(store: dist.Store, rank: int) -> str:
    key = f"joined/{rank}"
    return f"rank {rank} on {store.get(key).decode()}" if store.check([key]) else f"rank {rank}"


class _Wait:
    """Bounds, interrupts and names a wait that polls."""

    def __init__(self, timeout: timedelta, stop: StopRequest | None):
        self._stop, self._timeout_s = stop, timeout.total_seconds()
        self._started_s, self._name_at_s = time.monotonic(), NAME_AFTER_S

    def pause(self, describe: Callable[[], str]) -> None:
        """Sleeps before the next poll; `describe` returns what is missing and the fix."""
        if self._stop is not None:
            self._stop.check("this rank was waiting for the others to start")
        waited_s = time.monotonic() - self._started_s
        if waited_s > self._timeout_s:
            raise RendezvousError(f"no start after {waited_s / 60:.0f} minutes (DEEPSPEED_TIMEOUT): {describe()}")
        if waited_s >= self._name_at_s:
            logger.warning("waiting for %.0f s: %s", waited_s, describe())
            self._name_at_s *= 4
        time.sleep(_POLL_S)


def _listen(address: str, port: int) -> socket.socket:
    try:
        if address or not socket.has_dualstack_ipv6():
            return socket.create_server((address, port), backlog=4096)
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RendezvousError(
                f"port {port} is in use, perhaps by another job on this host; choose another one with MASTER_PORT "
                "(under deepspeed and torchrun: --master_port)"
            ) from error
        raise RendezvousError(f"rank 0 cannot listen at {address or '*'}:{port} (MASTER_PORT): {error}") from error


def _reach(address: str, port: int, wait: _Wait) -> None:
    reason = ""

    def describe() -> str:
        return (
            f"rank 0 does not answer at {address}:{port} ({reason}); see its log, and check MASTER_ADDR, MASTER_PORT "
            "and the network between the hosts"
        )

    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = str(error)
        wait.pause(describe)


def _join(store: dist.Store, ranks: Ranks, wait: _Wait) -> None:
    store.set(f"joined/{ranks.rank}", f"{os.uname().nodename} (process {os.getpid()})")

    def missing() -> list[int]:
        return [rank for rank in range(ranks.world_size) if not store.check([f"joined/{rank}"])]

    def describe() -> str:
        late = missing()
        first = f"; the first is rank {late[0]}, see its log" if late else ""
        return f"{len(late)} of {ranks.world_size} ranks have not started{first}"

    try:
        while not store.check(["all joined"]):
            if ranks.is_main and not missing():
                store.set("all joined", "1")
            else:
                wait.pause(describe)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank 0 has ended while this rank waited for the others: see its log ({error})"
        ) from error
