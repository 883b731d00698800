"""The judge `command`: programs that answer, fail, or write nonsense."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bpo.job.exits import JobError
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.command import CommandJudge
from tests.ranking.candidates import config_of, judged
from tests.sample_groups import group, turn

Make = Callable[[str], CommandJudge]
HEAD = "import json, os, sys\nentries = [json.loads(line) for line in sys.stdin]\n"
SCORE = (
    HEAD
    + """
for entry in reversed(entries):
    sizes = [os.path.getsize(image) for image in entry["images"]]
    scores = [len(c["response"]) - len(entry["prompt"]) for c in entry["completions"]]
    details = [{"type": c["type"], "seen": min(sizes) > 0} for c in entry["completions"]]
    print(json.dumps({"id": entry["id"], "scores": scores, "details": details}))
"""
)


@pytest.fixture
def make(photo_root: Path, tmp_path: Path) -> Callable[[str], CommandJudge]:
    """Makes a judge of a program's source."""

    def made(program: str) -> CommandJudge:
        script = tmp_path / "own judge.py"
        script.write_text(program)
        config = config_of(photo_root / "c.jsonl", "command", {"command": [sys.executable, str(script)]})
        return CommandJudge(config, Ranks())

    return made


def test_a_program_scores_each_answer(make: Make) -> None:
    records = [group("a", "a cat", "cats"), group("b", "no", "yes, two", image="tall.png", prompt=turn(None, "Is it?"))]
    first, second = judged(make(SCORE), *records)
    assert first == Scored((0.0, -1.0), ({"type": "gt", "seen": True}, {"type": "mllm-hal", "seen": True}))
    assert isinstance(second, Scored) and second.scores == (-4.0, 2.0)


def test_the_command_may_be_text_and_its_script_is_part_of_the_identity(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text(SCORE)
    config = config_of(tmp_path / "c.jsonl", "command", {"command": f"{sys.executable} '{tmp_path / 'j.py'}' --top"})
    before = CommandJudge(config, Ranks()).identity()
    assert before["command"] == [sys.executable, str(tmp_path / "j.py"), "--top"]
    (tmp_path / "j.py").write_text(SCORE + "# another\n")
    after = CommandJudge(config, Ranks()).identity()
    assert before["files (SHA-256)"].keys() >= {str(tmp_path / "j.py")} and before != after


def test_groups_without_a_valid_line_have_failed(make: Make) -> None:
    program = (
        HEAD
        + """
print(json.dumps({"id": "a", "scores": ["high", "low"]}))
print(json.dumps({"id": "b"}))
print("ready")
print(json.dumps({"id": "other", "scores": [1, 2]}))
print(json.dumps({"id": "c", "scores": [1, 2]}))
"""
    )
    records = [group(name, "a cat", "cats") for name in ("a", "b", "c", "silent")]
    records.append(group("gone", "a cat", "cats", image="gone.png"))
    results = dict(make(program).judge("scores", records))
    assert results[0].reason.startswith("invalid line of the program: ValueError(") and "high" in results[0].reason
    assert results[1].reason.startswith("invalid line of the program: KeyError('scores')")
    assert results[2] == Scored((1.0, 2.0))
    assert results[3] == Failed("no line of the program: it wrote b'ready'")
    assert isinstance(results[4], Failed) and "gone.png" in results[4].reason


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys\nsys.exit('no GPU is free')\n", r"judge.py'` ended with 1: no GPU is free"),
        ("import os\nos.kill(os.getpid(), 9)\n", "judge.py'` ended with -9: it wrote nothing to stderr"),
    ],
)
def test_a_program_that_fails_ends_the_job(make: Make, program: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        judged(make(program), group("a", "a cat", "cats"))


def test_a_program_that_does_not_exist_is_named(photo_root: Path) -> None:
    config = config_of(photo_root / "c.jsonl", "command", {"command": "bpo-no-such-judge --fast"})
    with pytest.raises(JobError, match="`bpo-no-such-judge --fast` cannot be started .No such file"):
        judged(CommandJudge(config, Ranks()), group("a", "a cat", "cats"))
    with pytest.raises(ValueError, match="rank.options.command is empty"):
        CommandJudge(config_of(photo_root / "c.jsonl", "command"), Ranks())
