"""Ranks and addresses from launchers."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

from bpo.job.launch import (
    Ranks,
    export_torch_environment,
    first_host,
    pick_device,
    ranks_from_environment,
    ranks_per_node,
    restart_count,
    setup_logging,
)


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, Ranks(5, 6, 2)),
        # torchrun or deepspeed inside a Slurm allocation: the launcher's own variables count
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
            Ranks(1, 2, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0)),
        # mpirun in a batch script of Slurm, whose own variables describe one task
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            Ranks(3, 4, 1),
        ),
        ({"SLURM_PROCID": "0"}, Ranks(0, 1, 0)),
    ],
)
def test_ranks_of_each_launcher(environment: dict[str, str], ranks: Ranks) -> None:
    assert ranks_from_environment(environment) == ranks
    assert ranks.is_main == (ranks.rank == 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "first"}, "RANK is 'first'"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": ""}, "SLURM_LOCALID is ''"),
        (
            {"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_PROCID=7 is not below SLURM_STEP_NUM_TASKS=2",
        ),
    ],
)
def test_bad_values_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_from_environment(environment)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("login", "login"),
        ("gpu-1.cluster,gpu-2.cluster", "gpu-1.cluster"),
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[9,003-007]", "gpu9"),
        ("node[12]-ib,node13", "node12-ib"),
        ("a,b[1-2]", "a"),
        ("rack[2-4]node[08-16],x", "rack2node08"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a"])
def test_unreadable_node_list_is_shown(nodelist: str) -> None:
    with pytest.raises(ValueError, match=f"node list '{nodelist}'"):
        first_host(nodelist)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    names = (
        "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT SLURM_JOB_NODELIST SLURM_STEP_NODELIST SLURM_JOB_ID".split()
    )
    for name in names:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_srun_ranks_meet_at_the_first_host_and_a_port_of_their_job(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("SLURM_JOB_NODELIST", "gpu[03-04]")
    clean_environment.setenv("SLURM_JOB_ID", "123456")
    export_torch_environment(Ranks(3, 4, 1))
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
    }
    assert os.environ["MASTER_PORT"] == str(29500 + 3456)


def test_a_step_on_a_part_of_the_nodes_meets_at_the_first_of_that_part(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("SLURM_JOB_NODELIST", "gpu[03-06]")
    clean_environment.setenv("SLURM_STEP_NODELIST", "gpu[05-06]")
    export_torch_environment(Ranks(1, 2, 0))
    assert os.environ["MASTER_ADDR"] == "gpu05"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 1),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_SIZE": "4"}, 4),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"RANK": "0", "WORLD_SIZE": "16"}, None),
    ],
)
def test_ranks_of_a_node(variables: dict[str, str], expected: int | None) -> None:
    assert ranks_per_node(variables) == expected


def test_restarts_are_those_that_slurm_counts() -> None:
    assert restart_count({}) == 0
    assert restart_count({"SLURM_RESTART_COUNT": "2"}) == 2
    with pytest.raises(ValueError, match="SLURM_RESTART_COUNT is 'two'"):
        restart_count({"SLURM_RESTART_COUNT": "two"})


def test_one_process_meets_itself_and_a_launcher_is_not_overruled(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("SLURM_JOB_NODELIST", "gpu[03-04]")
    clean_environment.setenv("MASTER_PORT", "1234")
    export_torch_environment(Ranks())
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "1234")


def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Ranks(5, 8, 5)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(Ranks(5, 8, 1)) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one GPU per task, as srun binds them
    assert pick_device(Ranks(5, 8, 1)) == torch.device("cuda", 0)


@pytest.mark.parametrize(("ranks", "level"), [(Ranks(0, 2, 0), logging.INFO), (Ranks(1, 2, 1), logging.WARNING)])
def test_only_rank_0_logs_progress_and_lines_name_their_rank(
    ranks: Ranks, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(logging, "basicConfig", lambda **options: seen.update(options))
    setup_logging(ranks)
    assert seen["level"] == level
    line = seen["handlers"][0].format(logging.LogRecord("a", 30, "", 1, "text", (), None))
    assert f"[rank {ranks.rank}] WARNING a: text" in line
