"""Experiment trackers: their own libraries, offline, where installed."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest

from bpo.config.tracking import TrackingConfig
from bpo.config.training import Config, TrainConfig
from bpo.training.metrics import MetricsWriter
from bpo.training.trackers import Trackers, open_trackers, without_secrets

KEY = "0123456789abcdef0123456789abcdef01234567"


def config_for(tmp_path: Path, *to: str, resume: bool = False) -> Config:
    return Config(
        train=TrainConfig(output_dir=str(tmp_path / "run"), tensorboard=False, resume=resume, lr=1.25e-6),
        tracking=TrackingConfig(to=list(to), offline=True),  # type: ignore[arg-type]
    )


def opened(config: Config, start_step: int = 0) -> Trackers:
    Path(config.train.output_dir).mkdir(exist_ok=True)
    return open_trackers(config, enabled=True, start_step=start_step)


def log_twice(config: Config) -> None:
    """Two starts of one run: steps 1 and 2, then 3."""
    for resume, steps in ((False, (1, 2)), (True, (3,))):
        config.train.resume = resume
        trackers = opened(config, steps[0] - 1)
        for step in steps:
            trackers.log(step, {"loss": 0.5 / step, "eval/chair (list a)/chair_i": 0.25})
        trackers.close()


def test_weights_and_biases_continues_its_run_and_no_key_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    log_twice(config_for(tmp_path, "wandb"))
    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1, "both starts are one run"
    for path, value in zip(files, (b"0.25", b"0.16666666666666666"), strict=True):  # values are JSON text in it
        until = time.monotonic() + 30  # its own process may still write
        while value not in path.read_bytes() and time.monotonic() < until:
            time.sleep(0.1)
        assert value in path.read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_mlflow_continues_its_run(tmp_path: Path) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="the extra mlflow is not installed")
    log_twice(config_for(tmp_path, "mlflow"))
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("run", "FINISHED")]
        loss = database.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        assert loss == [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))]
        assert database.execute("select value from params where key = 'train.lr'").fetchone() == ("1.25e-06",)


def test_trackio_continues_its_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:  # its folder is read when it is imported
        pytest.skip("the extra trackio is not installed")
    log_twice(config_for(tmp_path, "trackio"))
    with sqlite3.connect(tmp_path / "run" / "trackio" / "bpo.db") as database:
        rows = database.execute("select run_name, step from metrics order by step").fetchall()
    assert rows == [("run", 1), ("run", 2), ("run", 3)]


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"tracking\.to has trackio.*pip install 'bpo\[trackio\]'"):
        opened(config_for(tmp_path, "trackio"))


def test_a_tracker_that_fails_ends_neither_the_run_nor_other_trackers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        def __init__(self, fails_at: int = 0):
            self.steps: list[int] = []
            self.fails_at = fails_at

        def log(self, step: int, metrics: object) -> None:
            if step == self.fails_at:
                raise ConnectionError(f"503 for {os.environ['SERVICE_TOKEN']}")
            self.steps.append(step)

        def close(self) -> None:
            self.steps.append(-1)

    monkeypatch.setenv("SERVICE_TOKEN", KEY)
    good, bad = Recorder(), Recorder(fails_at=2)
    writer = MetricsWriter(tmp_path, enabled=True, start_step=0, trackers=Trackers({"good": good, "bad": bad}))
    for step in (1, 2, 3):
        writer.write(step, {"loss": 0.5})
    writer.close()
    assert (good.steps, bad.steps) == ([1, 2, 3, -1], [1])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert "bad failed at step 2" in caplog.text and KEY not in caplog.text


def test_a_server_that_does_not_answer_holds_up_no_step(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck:
        def __init__(self) -> None:
            self.released = threading.Event()

        def log(self, step: int, metrics: object) -> None:
            self.released.wait(30)

        def close(self) -> None: ...

    stuck = Stuck()
    trackers = Trackers({"server": stuck})
    started = time.monotonic()
    for step in range(100):
        trackers.log(step, {"loss": 0.5})
    trackers.close(timeout_s=0.2)
    stuck.released.set()
    assert time.monotonic() - started < 5
    assert "server did not accept all metrics" in caplog.text


def test_secrets_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert without_secrets(f"invalid key {KEY}") == "invalid key ***"


def test_other_ranks_open_nothing(tmp_path: Path) -> None:
    config = config_for(tmp_path, "wandb", "mlflow", "trackio")
    open_trackers(config, enabled=False, start_step=0).close()
    assert not (tmp_path / "run").exists()
