"""The commit in every report, with git, without git, and in a copy that is not a clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bpo_kernels.provenance import UNKNOWN, source_commit

# Every function that writes a commit into a report, called in one process.
REPORTS = """
import json, os, sys
from pathlib import Path
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path[:0] = [str(root), str(root / "benchmarks")]
import torch
from bpo.tools.bench import step
from bpo.config.training import Config
from bpo.job.launch import Ranks
from bpo.job.run_record import write_run_record
from bpo_kernels.bench import measure as bench_measure
import memory_check, synthetic
for commit in ("", "feedc0de"):
    os.environ["BPO_COMMIT"] = commit
    write_run_record(Config(), folder)
    line = (folder / "versions.txt").read_text().splitlines()[0]
    print(json.dumps({
        "run_record": line.removeprefix("commit: "),
        "bench_measure": bench_measure.machine(torch.device("cpu"))["commit"],
        "step": step.machine()["commit"],
        "synthetic": synthetic.machine_of_run()["commit"],
        "memory_check": memory_check.about(Ranks())["commit"],
    }))
"""


@pytest.fixture(autouse=True)
def no_commit_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BPO_COMMIT", raising=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "clone"
    (root / "bpo").mkdir(parents=True)
    (root / "bpo" / "a.py").write_text("one\n")
    git(root, "init", "-q")
    git(root, "add", "bpo")
    git(root, "-c", "user.name=T", "-c", "user.email=t@example.org", "commit", "-q", "-m", "first")
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_a_clone_and_whether_the_named_folders_differ_from_it(clone: Path) -> None:
    head = git(clone, "rev-parse", "HEAD")
    assert source_commit("bpo", root=clone) == head
    (clone / "notes.txt").write_text("beside the sources\n")
    assert source_commit("bpo", root=clone) == head
    assert source_commit(root=clone) == f"{head}+changes"
    (clone / "bpo" / "new.py").write_text("two\n")
    assert source_commit("bpo", root=clone) == f"{head}+changes"


def test_environment_variable_comes_first(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPO_COMMIT", "1234abcd+changes\n")
    assert source_commit("bpo", root=clone) == "1234abcd+changes"


def test_copy_inside_another_repository_does_not_take_its_commit(clone: Path) -> None:
    """As after `pip install bpo` into an environment inside a user's own repository."""
    installed = clone / ".venv" / "site-packages"
    (installed / "bpo").mkdir(parents=True)
    assert source_commit("bpo", root=installed) == UNKNOWN


def test_git_that_is_not_installed_or_refuses_is_no_error(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    assert source_commit("bpo", root=clone) == UNKNOWN
    refusing = tmp_path / "bin" / "git"  # as git in a directory of another owner
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho 'fatal: detected dubious ownership in repository' >&2\nexit 128\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(refusing.parent))
    assert source_commit("bpo", root=clone) == UNKNOWN


def test_every_report_is_written_without_git(tmp_path: Path, repo_root: Path) -> None:
    """Once without a commit, once with that of BPO_COMMIT."""
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", REPORTS, str(repo_root), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    unknown, given = map(json.loads, result.stdout.splitlines()[-2:])
    assert set(unknown.values()) == {UNKNOWN} and set(given.values()) == {"feedc0de"} and len(unknown) == 5
