"""Ranks that differ stop before anything long, with a message that names what differs, where."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from bpo.config.training import Config
from bpo.data.encode import load_encoder
from bpo.data.schedule import PlannedStep
from bpo.model.load import resolve_model
from bpo.training import agreement
from bpo.training.agreement import RanksDifferError, check_agreement, facts_of_plan, facts_of_start


class ThreadRanks:
    """Collectives between threads of this process."""

    def __init__(self, rank: int, board: list[Any], barrier: Barrier):
        self.rank, self.world_size, self._board, self._barrier = rank, len(board), board, barrier

    def sum(self, values: list[float]) -> list[float]:
        raise NotImplementedError

    def gather(self, item: Any) -> list[Any]:
        self._board[self.rank] = item
        self._barrier.wait(30)
        everyone = list(self._board)
        self._barrier.wait(30)
        return everyone


def outcomes(*facts: Mapping[str, Any]) -> list[str]:
    """The error of each rank, "" for none."""
    board, barrier = [None] * len(facts), Barrier(len(facts))

    def run(rank: int) -> str:
        try:
            check_agreement(facts[rank], ThreadRanks(rank, board, barrier))
        except RanksDifferError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(run, range(len(facts))))


@pytest.fixture
def facts(run: Config) -> Callable[..., dict[str, str]]:
    def of(**sections: Any) -> dict[str, str]:
        config = replace(run, **sections)
        return facts_of_start(config, resolve_model(config.model, for_training=True), load_encoder(config))

    return of


def test_equal_ranks_go_on(facts: Callable[..., dict[str, str]], run: Config) -> None:
    workers = replace(run.data, num_workers=7)  # may suit the node
    assert outcomes(facts(), facts(data=workers)) == ["", ""]


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("train", "lr", 0.5),
        ("loss", "beta", 0.7),
        ("lora", "alpha", 99),
        ("train", "seed", 5),
        ("model", "dtype", "bfloat16"),
    ],
)
def test_an_option_that_differs_is_named_on_every_rank(
    facts: Callable[..., dict[str, str]], run: Config, section: str, option: str, value: Any
) -> None:
    other = replace(getattr(run, section), **{option: value})
    errors = outcomes(facts(), facts(**{section: other}), facts())
    assert len(set(errors)) == 1
    host, before = socket.gethostname(), repr(getattr(getattr(run, section), option))
    expected = f"option {section}.{option}: {before} on rank 0 ({host}), rank 2 ({host}); {value!r} on rank 1 ({host})"
    assert expected in errors[0] and "the same arguments, files, code and packages" in errors[0]


def test_the_same_model_at_another_path_is_the_same_and_another_tokenizer_is_named(
    facts: Callable[..., dict[str, str]], run: Config, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run.model.path, tmp_path / "local copy"))
    local = replace(run.model, path=str(copy))
    assert outcomes(facts(), facts(model=local)) == ["", ""]
    template = next(copy.glob("chat_template*"))
    template.write_text(template.read_text() + "{# another version #}")
    errors = outcomes(facts(), facts(model=local))
    assert "model's chat template" in errors[1] and "vocabulary" not in errors[1]


def test_other_data_code_and_packages_are_named(
    facts: Callable[..., dict[str, str]], run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = facts()
    lines = Path(run.data.groups).read_text().splitlines(keepends=True)
    (tmp_path / "old.jsonl").write_text("".join(lines[1:]))
    stale = replace(run.data, groups=str(tmp_path / "old.jsonl"))
    source = Path(shutil.copytree(Path(agreement.bpo.__file__).parent, tmp_path / "bpo"))
    (source / "losses.py").write_text("# changed\n")
    monkeypatch.setattr(agreement.bpo, "__file__", str(source / "__init__.py"))
    monkeypatch.setattr(agreement, "version_of", lambda name: "0.1")
    error = outcomes(before, facts(data=stale))[0]
    for name in ("content of data.groups", "code of bpo", "version of pillow"):
        assert f"  {name}: " in error
    assert "code of the kernels" not in error
    gone = replace(run.data, groups=str(tmp_path / "not mounted here"))
    assert "missing on rank 1" in outcomes(before, facts(data=gone))[0]


def test_another_plan_is_named() -> None:
    def step(*groups: int) -> PlannedStep:
        return PlannedStep(0, 0, groups, ((groups,),), ((False,),))

    errors = outcomes(facts_of_plan([step(0, 1)]), facts_of_plan([step(1, 0)]))
    assert errors[0] == errors[1] and "plan of the steps" in errors[0]
    assert outcomes(facts_of_plan([step(0, 1)]), facts_of_plan([step(0, 1)])) == ["", ""]


def test_a_long_list_is_cut() -> None:
    ranks = [{f"option {i}": str(rank == 0) for i in range(30)} for rank in range(9)]
    error = outcomes(*ranks)[0]
    assert error.count("\n  option") == 10 and "and 20 more" in error and "rank 4" in error and "and 4 more" in error
