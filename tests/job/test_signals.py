"""Signals, and progress when one is received."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bpo.checkpoint.files import clean_leftovers
from bpo.config.training import TrainConfig
from bpo.job.exits import Interrupted
from bpo.job.guard import RunGuard
from bpo.job.launch import Ranks
from bpo.job.restarts import RestartCount
from bpo.job.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_remembered_until_the_next_boundary(number: signal.Signals, caplog) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check("nothing is kept")
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="stopped by a signal; 3 answers are kept"):
            stop.check("3 answers are kept")
    assert f"{number.name}: stopping at the next boundary" in caplog.text and "already stopping" in caplog.text
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("rank", "error", "counted"), [(0, Interrupted, False), (0, ValueError, True), (1, Interrupted, True)]
)
def test_an_interrupted_reference_pass_is_progress_and_a_failed_one_is_not(
    tmp_path: Path, rank: int, error: type[Exception], counted: bool
) -> None:
    """Only rank 0 keeps the count."""
    count = RestartCount(tmp_path)
    count.start(0, 3)
    guard = RunGuard(TrainConfig(output_dir=str(tmp_path)), Ranks(rank, 2, rank), clean_leftovers)
    with pytest.raises(error), guard.progress_if_interrupted():
        raise error("x")
    assert count.path.exists() == counted
