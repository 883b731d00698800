"""Collectives between ranks: what arrives, and that nothing received is unpickled."""

from __future__ import annotations

import errno
import math
import os
import pickle
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bpo.job.collectives import FirstRankError, from_rank_0, gather_from_ranks
from bpo.job.exits import EXIT_CANNOT_SAVE, Interrupted
from bpo.job.lock import RunLockError


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (f"{os.environ['BOMB']}-{os.getpid()}",)


def outcome(make: Any) -> dict[str, Any]:
    try:
        return {"value": from_rank_0(make)}
    except Exception as error:
        names = ("exit_code", "owns_directory")
        return {"type": type(error).__name__, "text": str(error), **{n: getattr(error, n, None) for n in names}}


def fail(error: Exception) -> Any:
    raise error


def rank(number: int, folder: Path) -> None:
    """One of two ranks: its results as a pickle of its own, which only the test that forked it reads."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=number, world_size=2, timeout=timedelta(seconds=30)
    )
    values = gather_from_ranks({"rank": number, "text": "é\ud800" * number, "loss": math.nan, "pair": (number, None)})
    rows = [[number, 3, "k" * 64, 4, 500]] * 90_000
    started = time.monotonic()
    counts = [len(rows) for rows in gather_from_ranks((rows, False))[1 - number][:1]]
    errors = [RunLockError("in use by process 7"), Interrupted("stopped"), OSError(errno.ENOSPC, "full"), KeyError("x")]
    found = {
        "values": values,
        "counts": counts,
        "seconds": time.monotonic() - started,
        "from_0": outcome(lambda: {"rank": number, "missing": [1, 2]}),
        "errors": [outcome(lambda error=error: fail(error)) for error in errors],
    }
    try:  # last: the other rank gets nothing
        gather_from_ranks(Bomb())
    except TypeError as error:
        found["refused"] = str(error)
    (folder / f"rank-{number}").write_bytes(pickle.dumps(found))


@pytest.mark.timeout(120)
def test_values_and_errors_arrive_as_json_and_objects_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks are forks of this process."""
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                rank(number, tmp_path)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    first, second = (pickle.loads((tmp_path / f"rank-{number}").read_bytes()) for number in range(2))
    for found in (first, second):
        assert [value["text"] for value in found["values"]] == ["", "é\ud800"]
        assert [value["pair"] for value in found["values"]] == [[0, None], [1, None]]
        assert math.isnan(found["values"][0]["loss"])
        assert found["counts"] == [90_000] and found["seconds"] < 10
        assert found["from_0"] == {"value": {"rank": 0, "missing": [1, 2]}}
        assert "Bomb is not JSON serializable" in found["refused"]
    assert not list(tmp_path.glob("bomb*"))
    assert [error["type"] for error in first["errors"]] == ["RunLockError", "Interrupted", "OSError", "KeyError"]
    lock, stop, disk, bug = second["errors"]
    assert lock == {"type": "FirstRankError", "text": "in use by process 7", "exit_code": 1, "owns_directory": False}
    assert (stop["type"], stop["text"]) == ("Interrupted", "stopped")
    assert disk["exit_code"] == EXIT_CANNOT_SAVE and "full" in disk["text"]
    assert (bug["type"], bug["text"]) == (FirstRankError.__name__, "rank 0 failed: KeyError: 'x'")
