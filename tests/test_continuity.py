"""Work that commit c84fdfe left unfinished is continued by the present code.

continuity/make.py wrote the files: a killed training run with its reference store, and a killed bootstrapping job.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from bpo.cli import main
from tests.bootstrap.fake_server import completion, fake_server
from tests.continuity.make import ARCHIVE, NUM_ANSWERED, NUM_RECORDS, NUM_STEPS, STOPPED_AT, command, rewrite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_training_run_is_resumed_at_its_step_beside_its_reference(repo_root: Path, folder: Path) -> None:
    run = folder / "run"
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]  # of the unbroken run
    store = {path.name: path.read_bytes() for path in (run / "reference").iterdir() if path.suffix != ".json"}
    line, environment = command(repo_root, "train", "--resume")
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"continuing from run/checkpoints/step-{STOPPED_AT:08}: {STOPPED_AT} steps are done" in done.stderr
    # Its reference log-probs are of whole groups, the present ones of each answer: they are computed and added.
    assert "8 groups computed now" in done.stderr
    assert {name: (run / "reference" / name).read_bytes() for name in store} == store
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in after] == list(range(1, NUM_STEPS + 1))
    assert after[:STOPPED_AT] == before[:STOPPED_AT]
    for old, new in zip(before, after, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-4)
        assert new["lr"] == old["lr"]
    assert (run / "checkpoints" / f"step-{NUM_STEPS:08}" / "manifest.json").is_file()
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0


# Defaults and prompts of that version.
EARLIER_OPTIONS = (
    "--bootstrap.validate.max_changed_share=1.0",
    "--bootstrap.validate.same_form=false",
    "--bootstrap.inject.attempts=1",
    f"--bootstrap.inject.prompt_dir={ARCHIVE.parent / 'prompts'}",
)


def test_a_bootstrapping_job_keeps_its_outcomes_and_merges(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    parts = folder / "made" / "groups.jsonl.parts"
    before = (parts / "rank-00000.jsonl").read_bytes()
    with fake_server(lambda body, number: completion(rewrite(body))) as (url, received):
        job = ["bootstrap", "--config", "bootstrap.yaml", f"--bootstrap.inject.server.url={url}"]
        assert main(job) == 1  # another default decides which errors are kept: never mixed in silence
        assert "max_changed_share was 1.0, is 0.6" in capsys.readouterr().err and not received
        assert main([*job, *EARLIER_OPTIONS]) == 0
    assert len(received) == NUM_RECORDS - NUM_ANSWERED
    after = (parts / "rank-00000.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == NUM_RECORDS
    assert not list((parts / "claims").iterdir())
    groups = [json.loads(line) for line in (folder / "made" / "groups.jsonl").read_text().splitlines()]
    assert [group["id"] for group in groups] == [f"r{number}" for number in range(NUM_RECORDS)]
    assert [group["completions"][1]["response"] for group in groups] == [
        f"Photo {number} shows a dog on a mat." for number in range(NUM_RECORDS)
    ]
