"""Ranks that meet, that do not come, and what listens meanwhile."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bpo.job import one_process, rendezvous
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.rendezvous import RendezvousError, collective_timeout, is_on_one_host, master_port, meet, named_wait
from bpo.job.signals import StopRequest

NO_WAIT = timedelta(seconds=0.5)
pytestmark = pytest.mark.timeout(60)


def listening() -> set[tuple[str, int]]:
    """Address (hexadecimal, as in /proc) and port of the TCP sockets on which this process listens."""
    own = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as lines:
            for fields in map(str.split, list(lines)[1:]):
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                    address, port = fields[1].split(":")
                    found.add((address, int(port, 16)))
    return found


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "_store", None)
    monkeypatch.setattr(rendezvous, "_arrivals", 0)
    monkeypatch.setattr(rendezvous, "NAME_AFTER_S", 0.2)
    return port


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the names that DeepSpeed uses
def test_one_process_opens_no_port_and_its_collectives_are_exact(port: int) -> None:
    before = listening()
    store = meet(Ranks(), NO_WAIT)
    dist.init_process_group(one_process.register(), store=store, rank=0, world_size=1)
    try:
        given, output = torch.arange(3.0), torch.zeros(3)
        for reduce in (
            dist.all_reduce,
            lambda tensor: dist.broadcast(tensor, 0),
            lambda tensor: dist.reduce(tensor, 0),
        ):
            reduce(given)
        calls: list[Any] = [
            lambda: dist.all_gather([output], given),
            lambda: dist.all_gather_into_tensor(output, given),
            lambda: dist.reduce_scatter(output, [given]),
            lambda: dist.reduce_scatter_tensor(output, given, async_op=True).wait(),
            lambda: dist.scatter(output, [given], 0),
            lambda: dist.gather(given, [output], 0),
        ]
        for call in calls:
            output.zero_()
            call()
            assert output.tolist() == [0.0, 1.0, 2.0]
        with dist.distributed_c10d._coalescing_manager(async_ops=True) as work:  # as ZeRO-3 gathers weights
            dist.all_gather_into_tensor(output, 2 * given)
        work.wait()
        assert output.tolist() == [0.0, 2.0, 4.0]
        dist.barrier(dist.new_group([0]))
        assert listening() == before
    finally:
        dist.destroy_process_group()


def test_ranks_of_one_host_meet_on_its_loopback_interface(port: int, caplog: pytest.LogCaptureFixture) -> None:
    stores: dict[int, dist.Store] = {}

    def start(rank: int) -> None:
        stores[rank] = meet(Ranks(rank, 2, rank), timedelta(seconds=30))

    other = threading.Thread(target=start, args=(1,))
    other.start()  # before rank 0, which it then waits for
    time.sleep(0.5)
    start(0)
    other.join(20)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    assert ("0100007F", port) in listening()
    assert {address for address, number in listening() if number == port} == {"0100007F"}
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert f"rank 0 does not answer at 127.0.0.1:{port}" in caplog.text and "check MASTER_ADDR" in caplog.text

    caplog.clear()
    with named_wait(Ranks(0, 2, 0)):  # to which rank 1 does not come
        time.sleep(0.6)
    assert f"rank 1 on {os.uname().nodename} (process {os.getpid()})" in caplog.text
    caplog.clear()
    stores[0].set("arrivals/1", "2")  # now it has come as well
    with named_wait(Ranks(0, 2, 0)):
        time.sleep(0.6)
    assert "the network between the ranks" in caplog.text


def test_a_rank_that_does_not_come_is_named_and_waited_for_in_bounded_time(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RendezvousError, match="1 of 2 ranks have not started; the first is rank 1, see its log"):
        meet(Ranks(0, 2, 0), NO_WAIT)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once within this time
    with pytest.raises(Interrupted, match="waiting for the others to start"), StopRequest() as stop:
        stop.received = True
        meet(Ranks(1, 2, 1), timedelta(seconds=30), stop)


def test_a_port_in_use_is_an_error_that_names_the_variable(port: int) -> None:
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(RendezvousError, match=f"port {port} is in use.* MASTER_PORT .*--master_port"),
    ):
        meet(Ranks(0, 2, 0), NO_WAIT)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("MASTER_PORT", "http", master_port),
        ("MASTER_PORT", "70000", master_port),
        ("DEEPSPEED_TIMEOUT", "1 hour", collective_timeout),
        ("DEEPSPEED_TIMEOUT", "0", collective_timeout),
    ],
)
def test_bad_values_are_named(name: str, value: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        read()


@pytest.mark.parametrize(
    ("address", "variables", "one_host"),
    [
        ("127.0.0.1", {}, True),
        ("localhost", {}, True),
        ("gpu1", {}, False),
        ("gpu1", {"LOCAL_WORLD_SIZE": "4"}, True),
        ("gpu1", {"LOCAL_SIZE": "2"}, False),
        ("gpu1", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}, True),
        ("gpu1", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, False),
        # torchrun, started by one step per node
        ("gpu1", {"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, False),
    ],
)
def test_launchers_tell_whether_all_ranks_are_on_one_host(
    address: str, variables: dict[str, str], one_host: bool, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    assert is_on_one_host(Ranks(0, 4, 0), address) == one_host
