"""SIGKILL of one rank or of all at every stage of a save.

Two real processes over gloo save step 10, then step 20, and are killed within it. What the log says was saved must be
there, whole, and the next job must be able to save again.
"""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest
from checkpoint_worker import Run, save_and_die, stored_step, warm_context

from bpo.checkpoint.files import STAGES, clean_leftovers, newest_valid_checkpoint

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    return warm_context()


def killed_run(
    context: multiprocessing.context.ForkServerContext, output_dir: Path, stage: str, victim: int, kill_all: bool
) -> str:
    """Starts both ranks, waits for the victim's end, kills the other (or waits for it); returns what rank 0 logged."""
    ranks = [context.Process(target=save_and_die, args=(r, str(output_dir), stage, victim)) for r in (0, 1)]
    for process in ranks:
        process.start()
    try:
        ranks[victim].join(60)
        assert ranks[victim].exitcode == -signal.SIGKILL
        if kill_all:
            ranks[1 - victim].kill()  # it may have ended already
        ranks[1 - victim].join(60)
        assert ranks[1 - victim].exitcode not in (None, 0)  # a survivor must not report success
    finally:
        for process in ranks:
            process.kill()
    return (output_dir / "log.0").read_text()


# Only rank 0 runs the stages after hashing.
CASES = [(stage, victim) for stage in STAGES[:3] for victim in (0, 1)] + [(stage, 0) for stage in STAGES[3:]]


@pytest.mark.parametrize("kill_all", [False, True], ids=["one rank", "all ranks"])
@pytest.mark.parametrize(("stage", "victim"), CASES)
def test_what_was_said_to_be_saved_is_there(
    context: multiprocessing.context.ForkServerContext, tmp_path: Path, stage: str, victim: int, kill_all: bool
) -> None:
    log = killed_run(context, tmp_path, stage, victim, kill_all)
    assert "step-00000010" in log
    logged = 20 if "saved" in log and "step-00000020" in log else 10
    clean_leftovers(tmp_path)
    found = newest_valid_checkpoint(tmp_path)
    assert found is not None
    step = stored_step(*found)
    assert step == found[1]["step"] and step >= logged
    # The new one is valid from the rename on, not before.
    assert step == (20 if STAGES.index(stage) >= STAGES.index("renamed") else 10)
    assert (tmp_path / "checkpoints" / "latest").read_text() == found[0].name
    Run(tmp_path, keep_last=1).save(30)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step-00000030"]
