"""Interrupted measuring continues where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bpo.config.loss import TermConfig
from bpo.config.training import Config
from bpo.data import encode
from bpo.data.groups import MeasuredGroup
from bpo.data.reference_keys import KEY_HEX
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.training import measure
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


def test_a_measured_group_is_few_bytes_between_ranks() -> None:
    """180,000 groups, of an image each, are then below 32 MB."""
    group = MeasuredGroup(1_500, 3, "f" * 64, 4, 1_700, [[2_000_000, 1_700_000_000_123_456_789]])
    sent = json.dumps(measure._to_json(group), separators=(",", ":"))
    assert len(sent) < 180 and measure._from_json(json.loads(sent)) == group
    dropped = encode.Dropped("g1", "bad-image", "missing")
    assert measure._from_json(json.loads(json.dumps(measure._to_json(dropped)))) == dropped


def test_the_content_of_a_run_changes_with_a_weight_and_not_without(run: Config) -> None:
    def content() -> list[str]:
        return list(measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine]).content())

    path = Path(run.data.groups)
    unweighted, before = path.read_text(), content()
    path.write_text(unweighted.replace('"score": 0,', '"score": 0, "weight": 1.0,'))
    assert content() == before  # as in checkpoints of versions without weights
    path.write_text(unweighted.replace('"no 3", "score": 0,', '"no 3", "score": 0, "weight": 0.5,'))
    changed = content()
    assert [index for index in range(NUM_GROUPS) if changed[index] != before[index]] == [3]
    path.write_text(unweighted.replace('"no 3", "score": 0,', '"no 3", "score": 0, "explored": true,'))
    assert [index for index in range(NUM_GROUPS) if content()[index] != before[index]] == [3]


def test_a_term_on_explored_answers_needs_one_in_the_file(run: Config) -> None:
    own = {"response": "maybe", "score": 0.5, "type": "mllm-greedy", "paired": False, "explored": True}
    run.loss.terms = [TermConfig(), TermConfig(type="log_ratio", pairs="explored")]
    with pytest.raises(ValueError, match=r"groups\.jsonl: .* no completion is explored; mark the model's own answers"):
        measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    path = Path(run.data.groups)
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first["completions"].append(own)
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, *others)))
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    assert [group.num_pairs for group in data.measured] == [1] * NUM_GROUPS
    assert [len(group.cell_keys) // KEY_HEX for group in data.measured] == [3] + [2] * (NUM_GROUPS - 1)
    assert data.measured[0].num_tokens == data.measured[3].num_tokens + len("maybe") + 1
