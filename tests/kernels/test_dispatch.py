"""Selection of the implementation, and the errors if it cannot run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from bpo_kernels import checks, dispatch


@pytest.fixture(autouse=True)
def no_choice_made_before(monkeypatch):
    monkeypatch.delenv("BPO_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())


def gather() -> torch.Tensor:
    return dispatch.logprob_gather(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))


def test_cpu_runs_plain_pytorch_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="bpo_kernels.dispatch"):
        gather()
        gather()
    assert [record.getMessage() for record in caplog.records] == ["kernels: plain on cpu"]


def test_unknown_word_is_an_error(monkeypatch):
    monkeypatch.setenv("BPO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="BPO_KERNELS is 'cuda': set it to one of auto, triton, plain"):
        gather()


def test_triton_on_a_cpu_tensor_is_an_error_that_names_the_ways_out(monkeypatch):
    monkeypatch.setenv("BPO_KERNELS", "triton")
    with pytest.raises(ValueError, match="the tensor is on cpu: move it to a GPU, set TRITON_INTERPRET=1"):
        gather()


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if not installed
import torch
from bpo_kernels import dispatch
logits, target = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
print(dispatch.logprob_gather(logits, target).item())
import os
os.environ.update(BPO_KERNELS="triton", TRITON_INTERPRET="1")
try:
    dispatch.logprob_gather(logits, target)
except ImportError as error:
    print(error)
"""


def test_without_triton_the_cpu_works_and_triton_says_what_is_missing():
    environment = {key: value for key, value in os.environ.items() if key != "BPO_KERNELS"}
    command = [sys.executable, "-c", _WITHOUT_TRITON]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    value, message = result.stdout.splitlines()
    assert float(value) == pytest.approx(-1.3862944)
    assert "install triton, or set BPO_KERNELS=plain" in message


def test_triton_refuses_fp64():
    with pytest.raises(ValueError, match="set BPO_KERNELS=plain for fp64"):
        checks.check_triton_dtype("logits_NV", torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("num_rows", "budget_rows", "expected"), [(0, 4, 1), (1, 4, 1), (8, 8, 8), (9, 8, 5), (100, 8, 8), (5, 0.1, 1)]
)
def test_rows_are_spread_evenly_within_the_budget(num_rows, budget_rows, expected):
    budget_bytes = int(budget_rows * 1000 * 4)
    assert checks.rows_per_chunk(num_rows, 1000, 4, budget_bytes, torch.device("cpu")) == expected
