"""The `bpo` command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bpo import __version__
from bpo.cli import COMMANDS, main

COMMAND_NAMES = (
    "demo check convert bootstrap merge measure rank select train rounds evaluate judge export refs score view plan "
    "bench doctor"
).split()
OPTIONS = {
    "demo": ["--output", "--seeds"],
    "check": ["DATA", "--no-images", "--image-root", "--quarantine", "--max-bad-share"],
    "convert": ["IN", "OUT", "--to", "--images", "--on-bad", "--fetch-urls"],
    "bootstrap": ["--config", "--bootstrap.weaken.noise_step", "--bootstrap.inject.server.url", "--data.annotations"],
    "merge": ["--config", "--data.annotations", "--data.groups"],
    "measure": ["GROUPS", "--config", "--measure.pairs", "--evaluation.chair_instances"],
    "rank": ["--rank.judge", "--rank.candidates", "--images"],
    "select": ["--select.rule", "--select.judgements", "--data.groups"],
    "rounds": ["--status", "--jobs", "--rounds.each", "--rounds.handover"],
    "train": ["--config", "--train.lr", "--train.ds_config", "--loss.beta", "--lora.r", "--trainable.vision"],
    "evaluate": ["--config", "--suite", "--compare", "--evaluation.chair_instances", "--evaluation.pope_questions"],
    "judge": ["--judge.base", "--judge.prompt", "--judge.server.url", "--questions"],
    "export": ["--config", "--export.checkpoint", "--export.form"],
    "refs": ["inspect", "verify", "compact"],
    "score": ["--policy", "--reference", "--limit"],
    "view": ["--serve", "--out", "--scores"],
    "plan": ["--model", "--nodes", "--gpu-memory", "--groups-count", "--json"],
    "bench": ["kernels", "step", "bootstrap"],
    "doctor": ["bpo doctor"],
}


def run(*argv: str) -> int:
    """The exit status, either returned by the command or from its exit."""
    try:
        return main(list(argv))
    except SystemExit as stop:
        if isinstance(stop.code, str):  # the interpreter would print it
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert list(COMMANDS) == COMMAND_NAMES
    assert [name for name in COMMAND_NAMES if f"\n  {name} " not in text] == []


def test_help_of_a_benchmark_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "kernels", "--help") == 0
    text = capsys.readouterr().out
    assert [option for option in ("--shapes", "--dtype", "--json") if option not in text] == []


def test_unknown_benchmark_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "kernel") == 2
    assert "kernels" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_help_of_each_command_names_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert [option for option in OPTIONS[command] if option not in text] == []


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert run("trian") == 2
    assert f"unknown command 'trian'; the commands are {', '.join(COMMAND_NAMES)}" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"bpo {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export"], "export.checkpoint and export.output must both be given"),
        (["export", "--export.checkpont", "x"], "did you mean `export.checkpoint`?"),
        (["evaluate", "--evaluation.batch_size", "0"], "evaluation.batch_size is 0"),
        (["bootstrap", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["demo", "--seeds", "0"], "--seeds is 0"),
        (["train", "--train.lr", "0"], "train.lr is 0"),
        (["train"], "model.path and data.groups must be set"),
        (["train", "--model.path", "/no/where", "--data.groups", "g"], "model.path is '/no/where': no such directory"),
        (["bootstrap"], "data.annotations must be set"),
        (["evaluate"], "model.path must be set"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 1
    printed = capsys.readouterr().err
    assert message in printed and "error: " in printed and printed.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "bootstrap", "evaluate"])
def test_a_rank_that_is_no_number_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "abc")
    (tmp_path / "config.json").write_text("{}")
    inputs = [f"--{key}={tmp_path}" for key in ("model.path", "data.groups", "data.annotations")]
    assert run(command, *inputs, "--train.output_dir", str(tmp_path / "run")) == 1
    printed = capsys.readouterr().err
    assert "the environment variable RANK is 'abc'; it must be a number" in printed and printed.count("\n") == 1


def test_no_traceback_reaches_the_user() -> None:
    result = subprocess.run([sys.executable, "-m", "bpo.cli", "export"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "bpo export: error: " in result.stderr and "Traceback" not in result.stderr


def test_an_error_of_ours_is_one_line_and_its_traceback_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> int:
        raise KeyError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "doctor", broken)
    assert main(["doctor"]) == 1
    [file] = tmp_path.iterdir()
    printed = capsys.readouterr().err
    assert "KeyError: 'a bug'" in printed and str(file) in printed and printed.count("\n") == 1
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(KeyboardInterrupt(), 130, "stopped by Ctrl-C"), (OSError(28, "No space left on device", "a.json"), 74, "a.json")],
)
def test_ctrl_c_and_a_full_disk_are_one_line_with_their_code(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", ended)
    assert main(["doctor"]) == code
    printed = capsys.readouterr().err
    assert told in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "argv", ["--help", "train --help", "train --train.lr .inf", "bootstrap", "evaluate", "merge --x", "export --x"]
)
def test_help_and_mistakes_do_not_wait_for_torch(argv: str) -> None:
    code = (
        "import sys\nfrom bpo.cli import main\n"
        f"try: main({argv.split()})\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "False"
