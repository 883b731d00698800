"""Thirty random kills over one run change nothing.

Longer: python tests/soak.py --minutes N
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def fast_disk(tmp_path: Path) -> Iterator[Path]:
    """Processes die here, not hosts: files in memory serve, and the thousand fsyncs of the run cost nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def test_thirty_random_kills_change_no_loss_and_no_order(fast_disk: Path) -> None:
    result = soak(fast_disk, kills=30, seed=0)
    assert result.kills == 30 and result.flipped_bits >= 1
    assert result.steps_before_last_kill > 60  # the kills were spread over the run, not all at its beginning
    assert result.final_loss < 0.6  # and something was learnt
