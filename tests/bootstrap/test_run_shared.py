"""Shards, signals, and restarts without progress."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bpo.bootstrap.job.outcomes import OutcomeWriter
from bpo.bootstrap.run import run_bootstrap, run_merge
from bpo.cli import main as bpo
from bpo.config.bootstrap import BootstrapConfig, WeakenConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.job.exits import EXIT_INTERRUPTED, EXIT_NO_PROGRESS, Interrupted
from bpo.job.restarts import NoProgressError, RestartCount
from bpo.job.signals import StopRequest
from tests.bootstrap.jobs import num_lines, num_outcomes, parts, results, stop_after


@pytest.fixture
def job(photos: Path, tiny_llava_dir: Path):
    """Builds a job over the nine photographs in batches of two; its groups are written to `folder`."""

    def build(folder: str, **bootstrap: object) -> Config:
        groups = str(photos / folder / "groups.jsonl")
        options = {"sources": ["weaken"], "batch_size": 2, **bootstrap}
        return Config(
            model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
            data=DataConfig(annotations=str(photos / "annotations.json"), groups=groups, image_root=str(photos)),
            bootstrap=BootstrapConfig(weaken=WeakenConfig(temperature=1.0, max_new_tokens=6), **options),
        )

    return build


def signal_after(monkeypatch: pytest.MonkeyPatch, num_batches: int, number: signal.Signals) -> None:
    """Sends this process a signal during the write of batch `num_batches`."""
    append, written = OutcomeWriter.append, []

    def append_and_signal(self: OutcomeWriter, outcomes) -> None:
        append(self, outcomes)
        written.append(1)
        if len(written) == num_batches:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(OutcomeWriter, "append", append_and_signal)


def one_batch(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """Runs the job until a stop request after its first batch."""
    with monkeypatch.context() as patch, StopRequest() as stop, pytest.raises(Interrupted):
        stop_after(patch, 1, stop)
        run_bootstrap(config, progress=False, stop=stop)


def test_shards_in_any_order_and_a_merge_make_the_groups_of_one_job(job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job("whole")
    run_bootstrap(whole, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # each shard has two ranks
    for shard, rank in ((2, 1), (2, 0), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        one_batch(monkeypatch, job("shared", num_shards=3, shard_index=shard))
    summary = run_bootstrap(shared := job("shared", num_shards=3, shard_index=1), progress=False)
    assert summary.num_groups is None and not Path(shared.data.groups).exists()
    # Ranks 1, 3, 4 and 5 of six; the last one does the rest. A batch has two records, or the last one.
    assert len(num_lines(shared)) == 4 and sum(num_lines(shared)) == 9
    monkeypatch.delenv("RANK")
    merged = run_merge(job("shared"))
    assert merged.num_groups == len(results(whole)["groups.jsonl"].splitlines())
    assert results(shared) == results(whole)


def test_a_merge_names_what_is_missing(job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to merge; run `bpo bootstrap`"):
        run_merge(job("shared"))
    one_batch(monkeypatch, job("shared", num_shards=2))
    with pytest.raises(ValueError, match=r"7 of 9 outcomes are missing \(the first: weaken of record"):
        run_merge(job("shared"))
    with pytest.raises(ValueError, match="bootstrap.seed was 0, is 1"):
        run_merge(job("shared", seed=1))
    # The job resumes with another number of shards.
    one_batch(monkeypatch, job("shared", num_shards=4, shard_index=1))
    with pytest.raises(ValueError, match="5 of 9 outcomes are missing"):
        run_merge(job("shared"))


@pytest.mark.parametrize("changes", [{"num_shards": 0}, {"num_shards": 2, "shard_index": 2}, {"shard_index": -1}])
def test_a_shard_that_does_not_exist_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="bootstrap.(num_shards|shard_index) is"):
        BootstrapConfig(**changes)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_ends_the_batch_and_a_restart_goes_on(
    job, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole, stopped = job("whole"), job("stopped")
    run_bootstrap(whole, progress=False)
    signal_after(monkeypatch, 2, number)
    with StopRequest() as stop, pytest.raises(Interrupted, match="4 of 9 records of source `weaken` are done"):
        run_bootstrap(stopped, progress=False, stop=stop)
    assert num_outcomes(stopped) == 4 and not Path(stopped.data.groups).exists()
    run_bootstrap(stopped, progress=False)
    assert results(stopped) == results(whole)


def test_the_command_ends_with_the_codes_that_train_sh_knows(job, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = job("stopped")
    signal_after(monkeypatch, 1, signal.SIGUSR1)
    flags = ["--model.path", config.model.path, "--model.dtype", "float32", "--data.annotations"]
    flags += [config.data.annotations, "--data.groups", config.data.groups, "--data.image_root", config.data.image_root]
    flags += ["--bootstrap.sources", '["weaken"]', "--bootstrap.batch_size", "2"]
    flags += ["--bootstrap.weaken.max_new_tokens", "6"]
    before = signal.getsignal(signal.SIGTERM)
    assert bpo(["bootstrap", *flags]) == EXIT_INTERRUPTED
    assert "2 of 9 records of source `weaken`" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    RestartCount(parts(config), "restarts-00000-of-00001.json").start(2, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert bpo(["bootstrap", *flags, "--bootstrap.max_idle_restarts", "1"]) == EXIT_NO_PROGRESS


def test_restarts_that_finish_nothing_come_to_an_end(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job("stuck", num_shards=2)

    def start(restarts: int) -> None:
        """Runs the job with a stop request before its first batch."""
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        with StopRequest() as stop:
            stop.received = True
            run_bootstrap(config, progress=False, stop=stop)

    for restarts in range(4):
        with pytest.raises(Interrupted):
            start(restarts)
    with pytest.raises(NoProgressError, match=r"3 restarts since outcome 0.*restarts-00000-of-00002"):
        start(4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    one_batch(monkeypatch, job("stuck", num_shards=2, shard_index=1))
    with pytest.raises(NoProgressError):  # batches of another shard are not progress of this one
        start(5)
    run_bootstrap(job("stuck", num_shards=2, shard_index=1), progress=False)
    start(6)  # nothing is left to do


def test_progress_starts_the_count_anew(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job("slow")
    for restarts in range(1, 5):  # one batch per start: more starts than max_idle_restarts allows without progress
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        signal_after(monkeypatch, 1, signal.SIGUSR1)
        with StopRequest() as stop, pytest.raises(Interrupted):
            run_bootstrap(config, progress=False, stop=stop)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    run_bootstrap(config, progress=False)
    assert num_outcomes(config) == 9 and not list(parts(config).glob("restarts-*"))
