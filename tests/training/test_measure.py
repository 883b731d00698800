"""Interrupted measuring continues where it stopped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bpo.config.training import Config
from bpo.data import encode
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.training.measure import measure_groups
from tests.training.doubles import NUM_GROUPS


def test_a_signal_ends_measuring_on_all_ranks_and_lengths_are_kept(run: Config, decoded: Counter[str]) -> None:
    def gather(mine: Any) -> Any:
        """The other rank has measured its share and got no signal."""
        return [mine, ([], False)]

    with StopRequest() as stop:
        stop.received = True
        with pytest.raises(Interrupted, match="while measuring; 1 groups measured"):
            measure_groups(run, encode.load_encoder(run), Ranks(0, 2, 0), gather, stop)
        with pytest.raises(Interrupted):  # this one measured all of its share; the other was stopped
            stop.received = False
            measure_groups(run, encode.load_encoder(run), Ranks(0, 2, 0), lambda mine: [mine, ([], True)], stop)
    decoded.clear()
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    assert len(data.usable) == NUM_GROUPS
    assert sum(decoded.values()) == NUM_GROUPS // 2  # rank 0's half was stored
