"""`make .venv` (.ci/venv) with a fake Python that records the requests to pip. Installs nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

# `-m venv DIR` copies the fake to DIR/bin/python; `-m pip` appends its arguments to pip.log and can be set to wait, to
# fail or to kill the whole installation; everything else goes to the real interpreter.
STAND_IN = f"""#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        echo "$@" >>pip.log
        while [[ -e pip-waits ]]; do sleep 0.02; done
        if [[ -e pip-fails && "$*" == *torch* ]]; then exit 1; fi
        if [[ -e pip-is-killed && "$*" == *torch* ]]; then kill -9 $PPID; fi ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, repo_root: Path) -> Path:
    root = tmp_path / "a clone"
    (root / ".ci").mkdir(parents=True)
    for name in ("Makefile", "setup.py", "constraints.txt", ".ci/venv"):
        shutil.copy(repo_root / name, root / name)
    write_program(root / "standin", STAND_IN)
    return root


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make(root: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    # As from a user's shell: `make test` sets its own flags and level here, and a nested make prints both.
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *words], cwd=root, capture_output=True, text=True, timeout=300, env={**outer, **env})


def build(root: Path) -> subprocess.CompletedProcess[str]:
    return make(root, ".venv", "PYTHON=./standin")


def pip_calls(root: Path) -> list[str]:
    log = root / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_first_call_installs_pinned_versions_torch_before_bpo_and_second_call_reuses(checkout: Path) -> None:
    assert build(checkout).returncode == 0
    calls = pip_calls(checkout)
    assert all("-c constraints.txt" in call for call in calls)
    torch, bpo = (next(i for i, call in enumerate(calls) if word in call) for word in (" torch", "-e .[dev]"))
    assert torch < bpo and "--no-build-isolation" in calls[bpo]

    again = make(checkout, ".venv")  # without PYTHON: the existing one
    assert again.returncode == 0 and again.stdout == ""
    (checkout / "setup.py").touch()
    assert make(checkout, ".venv").returncode == 0
    assert pip_calls(checkout) == calls


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_changed_requirements_install_again(checkout: Path, name: str) -> None:
    build(checkout)
    num_calls = len(pip_calls(checkout))
    with (checkout / name).open("a") as file:
        file.write("# one more line\n")
    assert make(checkout, ".venv").returncode == 0
    assert len(pip_calls(checkout)) == 2 * num_calls


def test_killed_installation_starts_over(checkout: Path) -> None:
    (checkout / "pip-is-killed").touch()
    assert build(checkout).returncode != 0
    (checkout / ".venv" / "half-written").touch()
    (checkout / "pip-is-killed").unlink()
    again = build(checkout)
    assert again.returncode == 0 and "starting over" in again.stdout
    assert not (checkout / ".venv" / "half-written").exists()


def test_failed_installation_is_reported_and_goes_on_next_time(checkout: Path) -> None:
    (checkout / "pip-fails").touch()
    failed = build(checkout)
    assert failed.returncode != 0 and "error: pip could not install torch" in failed.stderr
    (checkout / ".venv" / "already-installed").touch()
    (checkout / "pip-fails").unlink()
    assert build(checkout).returncode == 0
    assert (checkout / ".venv" / "already-installed").exists()
    assert make(checkout, ".venv").stdout == ""


def test_moved_checkout_starts_over(checkout: Path) -> None:
    build(checkout)
    moved = checkout.rename(checkout.parent / "moved")
    again = build(moved)
    assert again.returncode == 0 and "starting over" in again.stdout


def test_checkout_reached_through_a_link_keeps_its_environment(checkout: Path) -> None:
    build(checkout)
    link = checkout.parent / "link"
    link.symlink_to(checkout)
    again = make(link, "-C", str(link), ".venv", PWD=str(link))
    direct = subprocess.run([str(link / ".ci" / "venv")], cwd=link, capture_output=True, text=True)
    assert (again.returncode, direct.returncode, direct.stdout) == (0, 0, ""), direct.stdout
    assert "starting over" not in again.stdout


def test_an_environment_that_a_process_uses_is_not_removed(checkout: Path) -> None:
    build(checkout)
    (checkout / ".venv" / "library.so").write_bytes(b"x" * 4096)
    code = (
        "import mmap, sys; file = open('.venv/library.so'); library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)"
    )
    command = [sys.executable, "-c", f"{code}; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        moved = checkout.rename(checkout.parent / "moved")
        refused = build(moved)
        assert refused.returncode != 0 and f"process {process.pid} uses it" in refused.stderr
        assert (moved / ".venv" / "library.so").exists()
    assert build(moved).returncode == 0


def test_a_link_to_the_environment_of_another_clone_is_replaced_and_that_one_kept(checkout: Path) -> None:
    build(checkout)
    other = Path(shutil.copytree(checkout, checkout.parent / "other", ignore=shutil.ignore_patterns(".venv")))
    (other / ".venv").symlink_to(checkout / ".venv")
    before = sorted(checkout.rglob("*"))
    again = build(other)
    assert again.returncode == 0 and "starting over" in again.stdout
    assert not (other / ".venv").is_symlink() and (other / ".venv" / "bin" / "python").exists()
    assert sorted(checkout.rglob("*")) == before
    assert make(checkout, ".venv").stdout == ""


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_a_second_call_waits_for_the_installation_of_the_first(checkout: Path) -> None:
    (checkout / "pip-waits").touch()
    first = subprocess.Popen(["bash", ".ci/venv", "./standin"], cwd=checkout, stdout=subprocess.DEVNULL)
    while not pip_calls(checkout):
        assert first.poll() is None
        time.sleep(0.02)
    second = subprocess.Popen(["bash", ".ci/venv", "./standin"], cwd=checkout, stderr=subprocess.PIPE, text=True)
    try:
        assert second.stderr is not None and "waiting for another call" in second.stderr.readline()
    finally:
        (checkout / "pip-waits").unlink()
        assert (first.wait(300), second.wait(300)) == (0, 0)
    assert len(pip_calls(checkout)) == 4  # the second found everything installed


def test_extra_is_installed_once_and_its_failure_is_a_warning(checkout: Path) -> None:
    build(checkout)
    num_calls = len(pip_calls(checkout))
    command = ["bash", ".ci/venv"]

    def with_extra() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=checkout, capture_output=True, text=True, env={**os.environ, "EXTRA": "torch"}
        )

    (checkout / "pip-fails").touch()  # as without a network
    failed = with_extra()
    assert failed.returncode == 0 and "warning: the extra 'torch' could not be installed" in failed.stderr
    (checkout / "pip-fails").unlink()
    assert with_extra().stderr == ""
    [*_, call] = pip_calls(checkout)
    assert "-c constraints.txt" in call and "--no-build-isolation" in call and call.endswith("-e .[torch]")
    assert with_extra().returncode == 0 and len(pip_calls(checkout)) == num_calls + 2


def test_extra_index_reaches_torch_alone(checkout: Path) -> None:
    assert make(checkout, ".venv", "PYTHON=./standin", "TORCH_INDEX=https://cpu.example").returncode == 0
    assert [call.split()[-1] for call in pip_calls(checkout) if "https://cpu.example" in call] == ["torch"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, "PYTHON=./other does not run"),
        ('[[ "$2" == *exit* ]] && exit 1; echo 3.9', "PYTHON=./other is Python 3.9; the pinned versions need 3.11"),
        ('[[ "$2" == *ensurepip* ]] && exit 1; echo 3.11', "apt install python3.11-venv"),
    ],
    ids=["absent", "too old", "without venv"],
)
def test_unusable_python_is_named(checkout: Path, program: str | None, message: str) -> None:
    if program is not None:
        write_program(checkout / "other", f"#!/usr/bin/env bash\n{program}\n")
    result = make(checkout, ".venv", "PYTHON=./other")
    assert result.returncode != 0 and message in result.stderr
    assert not (checkout / ".venv").exists()


def test_another_python_than_that_of_the_environment_is_refused(checkout: Path) -> None:
    build(checkout)
    write_program(checkout / "other", '#!/usr/bin/env bash\n[[ "$2" == *print* ]] && echo 3.13; exit 0\n')
    result = make(checkout, ".venv", "PYTHON=./other")
    assert result.returncode != 0 and "run 'make clean' first" in result.stderr


def test_floors_of_setup_are_the_versions_that_were_tested(repo_root: Path) -> None:
    """`make floor` writes the report; a floor that is raised or lowered must be tested again."""
    report = json.loads((repo_root / "benchmarks" / "results" / "floor.json").read_text())
    assert report["failed"] == 0 and report["passed"] > 2000
    setup = (repo_root / "setup.py").read_text()
    for name in ("torch", "transformers", "triton"):
        [floor] = re.findall(rf'"{name}>=([\d.]+)', setup)
        tested = ".".join(report["versions"][name].split("+")[0].split(".")[: floor.count(".") + 1])
        assert tested == floor, f"setup.py allows {name} {floor}, and {tested} was tested"
