"""Candidates for judges: groups files, their configuration, and a judge made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bpo.config.rank import RankConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.files import group_to_json
from bpo.job.launch import Ranks
from bpo.ranking.judge import JUDGES, Failed, Judge, JudgeDefinition, Scored
from bpo.records import PreferenceGroup
from tests.sample_groups import group


def groups(count: int) -> list[PreferenceGroup]:
    """Groups `g0`, `g1` ... of an annotation and a longer answer."""
    return [group(f"g{n}", "a cat", f"a cat and {n} dogs") for n in range(count)]


def write_groups(path: Path, records: Sequence[PreferenceGroup]) -> Path:
    path.write_text("".join(json.dumps(group_to_json(record)) + "\n" for record in records))
    return path


def config_of(candidates: Path, judge: str, options: dict[str, Any] | None = None, **rank: Any) -> Config:
    """A configuration that judges a file; images are beside it."""
    data = DataConfig(image_root=str(candidates.parent), **rank.pop("data", {}))
    return Config(data=data, rank=RankConfig(candidates=str(candidates), judge=judge, options=options or {}, **rank))


def judged(judge: Judge, *records: PreferenceGroup) -> list[Scored | Failed]:
    """The results of a judge with one pass, in order."""
    return [result for _, result in sorted(judge.judge("scores", records), key=lambda entry: entry[0])]


class CountingJudge(Judge):
    """Scores answers by their length in two passes, `long` and `short`, and remembers what it was asked."""

    passes = ("long", "short")

    def __init__(self, answer: Callable[[PreferenceGroup], Scored | Failed], version: int = 1):
        self.answer, self.version = answer, version
        self.asked: list[tuple[str, str]] = []

    def identity(self) -> dict[str, Any]:
        return {"version": self.version}

    def judge(self, name: str, records: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        for index, record in reversed(list(enumerate(records))):
            self.asked.append((name, record.id))
            result = self.answer(record)
            sign = 1.0 if name == "long" else -0.25
            yield index, result if isinstance(result, Failed) else Scored(tuple(sign * s for s in result.scores))

    def combine(self, results: Any) -> Scored:
        return Scored(tuple(map(sum, zip(*(results[name].scores for name in self.passes), strict=True))))


def by_length(record: PreferenceGroup) -> Scored | Failed:
    return Scored(tuple(float(len(completion.response)) for completion in record.completions))


def register(name: str, judge: Judge) -> None:
    """Makes an instance available as `rank.judge`."""

    def make(config: Config, ranks: Ranks) -> Judge:
        return judge

    JUDGES[name] = JudgeDefinition(name, make)
