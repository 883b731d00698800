"""SIGKILL in the middle of every stage: the same command goes on, and ends with the results of an unbroken run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.job.signals import StopRequest
from bpo.rounds.run import HISTORY, run_rounds
from bpo.rounds.stages import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STAGES = ("generate", "judge", "select", "train", "export")
# Forked from a process that has imported everything: a new interpreter costs more than a stage.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deepspeed", "tests.recipes.run_rounds"])


def _config(root: Path, output: Path) -> Config:
    """One round of SELM's recipe: two sources, a judge that asks a model, a reference."""
    import yaml

    from bpo.tools.demo.files import build_world
    from bpo.tools.demo.recipe import Recipe
    from bpo.tools.demo.rounds import DemoRounds, overlay, recipe_file
    from tests.recipes.run_rounds import WORLD

    world = build_world(root / "world", WORLD, progress=False)
    sizes = DemoRounds(recipe=Recipe(groups_per_step=4, batch_size=4), steps=6)
    tree = overlay("selm", root / "base", world, output, sizes)
    tree["train"]["save_every_steps"] = 1
    tree["rank"]["batch_size"] = 2
    tree["rounds"] |= {"each": [{}], "evaluate": False}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return load_config(["--config", str(recipe_file("selm")), "--config", str(path)])


def _make_base(root: Path) -> None:
    import torch

    from bpo.tools.demo.base import build_base_model
    from tests.recipes.run_rounds import BASE, WORLD

    torch.set_num_threads(1)
    build_base_model(root / "base", WORLD, BASE, progress=False)


def _run(root: Path, output: Path) -> None:
    """Runs the rounds in this process; marks the stage in which it is."""
    import torch

    from bpo import engine
    from bpo.job.launch import Ranks
    from tests.recipes.run_rounds import run_here

    torch.set_num_threads(1)
    engine.init_distributed(Ranks())

    def run(stage: Stage, processes: int, stop: StopRequest | None) -> int:
        (output / f"in-{stage.name}").touch()
        return run_here(stage, processes, stop)

    run_rounds(_config(root, output), run=run)
    os._exit(0)


def _start(target: Any, *arguments: Path) -> Any:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _seconds(output: Path) -> dict[str, float]:
    return {entry["stage"]: entry["seconds"] for entry in map(json.loads, (output / HISTORY).read_text().splitlines())}


def _results(output: Path) -> dict[str, bytes]:
    names = ("candidates.jsonl", "groups.jsonl", "policy/model.safetensors", "run/metrics.jsonl")
    return {name: (output / "round-1" / name).read_bytes() for name in names}


def test_killed_in_the_middle_of_each_stage_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for target, *arguments in ((_make_base, tmp_path), (_run, tmp_path, unbroken)):
        process = _start(target, *arguments)
        process.join()
        assert process.exitcode == 0
    spent = _seconds(unbroken)
    for stage in STAGES:
        process = _start(_run, tmp_path, killed)
        deadline = time.monotonic() + 60
        while not (killed / f"in-{stage}").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(spent[stage] / 2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"it ended before it could be killed in {stage}"
    process = _start(_run, tmp_path, killed)
    process.join()
    assert process.exitcode == 0
    expected, found = _results(unbroken), _results(killed)
    assert _steps(found.pop("run/metrics.jsonl")) == _steps(expected.pop("run/metrics.jsonl"))
    assert found == expected


def _steps(metrics: bytes) -> list[dict[str, float]]:
    """The metrics of all steps without times."""
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in metrics.splitlines()]
