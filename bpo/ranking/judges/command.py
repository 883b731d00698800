"""Asks a program of the user's for scores: JSON lines to its standard input, JSON lines from its standard output."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo.config.options import Section, check
from bpo.config.training import Config
from bpo.formats.images import ImageError, resolve_image_path
from bpo.job.durable import file_digest
from bpo.job.exits import JobError
from bpo.job.journal import from_line, to_line
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Judge, Scored, dialogue_of, register_judge
from bpo.ranking.options import judge_options
from bpo.records import PreferenceGroup

_SCRIPT_BYTES = 1 << 20  # larger files among the arguments are programs or weights, which the command line names


@dataclass(kw_only=True)
class CommandOptions(Section):
    """Options of the judge `command`.

    Attributes:
        command: Program with its arguments; no shell runs it. Text is split as a shell would.
    """

    where = "rank.options"

    command: str | list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.command), "rank.options.command is empty; set the program of the judge `command`")


@register_judge("command")
class CommandJudge(Judge):
    """Runs the program once per batch.

    It reads {"id", "images": [absolute path], "prompt": text, "completions": [{"response", "type"}]} and writes {"id",
    "scores": [number]}, with "details": [object] if it likes, in any order. A group without a valid line has failed.
    """

    def __init__(self, config: Config, ranks: Ranks):
        command = judge_options(CommandOptions, config).command
        self._command = shlex.split(command) if isinstance(command, str) else command
        self._image_root = Path(config.data.image_root or ".")

    def identity(self) -> dict[str, Any]:
        files = [Path(word) for word in self._command]
        scripts = {str(f): file_digest(f) for f in files if f.is_file() and f.stat().st_size <= _SCRIPT_BYTES}
        return {"command": self._command, "files (SHA-256)": scripts}

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        """Raises JobError if the program cannot be started or fails."""
        lines, other = {}, ""
        for index, group in enumerate(groups):
            try:
                lines[group.id] = index, self._line(group)
            except ImageError as error:
                yield index, Failed(f"unusable image: {error}")
        written = self._run(b"".join(line for _, line in lines.values())) if lines else b""
        for line in filter(bytes.strip, written.splitlines()):
            try:
                entry = from_line(line)
                index, _ = lines.pop(entry["id"])
            except (ValueError, LookupError, TypeError):
                other = other or f": it wrote {line[:200]!r}"
                continue
            try:
                yield index, Scored(tuple(map(float, entry["scores"])), tuple(map(dict, entry.get("details", ()))))
            except (ValueError, LookupError, TypeError) as error:
                yield index, Failed(f"invalid line of the program: {error!r} in {line[:200]!r}")
        yield from ((index, Failed(f"no line of the program{other}")) for index, _ in lines.values())

    def _line(self, group: PreferenceGroup) -> bytes:
        turns, answers = dialogue_of(group)
        types = [completion.type for completion in group.completions]
        request = {
            "id": group.id,
            "images": [str(resolve_image_path(self._image_root, image)) for image in group.images],
            "prompt": "\n".join(turn.text for turn in turns),
            "completions": [{"response": answer, "type": kind} for answer, kind in zip(answers, types, strict=True)],
        }
        return to_line(request)

    def _run(self, requests: bytes) -> bytes:
        try:
            ended = subprocess.run(self._command, input=requests, capture_output=True, check=False)
        except OSError as error:
            raise JobError(f"{self._named} cannot be started ({error.strerror}); check rank.options.command") from error
        if ended.returncode:
            tail = " ".join(ended.stderr.decode("utf-8", "replace").split())[-1000:]
            raise JobError(f"{self._named} ended with {ended.returncode}: {tail or 'it wrote nothing to stderr'}")
        return ended.stdout

    @property
    def _named(self) -> str:
        return f"the judge's program `{shlex.join(self._command)}`"
