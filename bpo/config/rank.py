"""Options of `bpo rank`: a judge scores the candidates of a groups file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bpo.config.options import Section, check, number, seconds


@dataclass(kw_only=True)
class RankConfig(Section):
    """Scoring of candidate answers by a judge (docs/rounds.md).

    Attributes:
        candidates: Groups file whose completions are scored; their own scores are ignored.
        output: Folder of the judgements; empty uses CANDIDATES.judgements. With `--images`, the file of annotations.
        judge: Name of the judge: `implicit`, `chair`, `claims`, `verifier`, `reward`, `server`, `command`, or a
            plug-in's.
        options: Options of the judge.
        plugin: Python file that registers judges.
        batch_size: Number of groups that are judged together and claimed by one process.
        num_shards: Number of jobs that share the groups, such as array tasks.
        shard_index: Index of this job, starting from 0.
        claim_timeout_s: Seconds without a heartbeat after which the work of a process is reassigned.
        stall_timeout_s: Seconds without a batch finished by any process after which others stop waiting for its work.
    """

    where = "rank"

    candidates: str = ""
    output: str = ""
    judge: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    plugin: str = ""
    batch_size: int = number(16, at_least=1)
    num_shards: int = number(1, at_least=1)
    shard_index: int = number(0, at_least=0)
    claim_timeout_s: float = seconds(120.0, at_least=1)
    stall_timeout_s: float = seconds(3600.0, at_least=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.shard_index < self.num_shards,
            f"rank.shard_index is {self.shard_index}; it must be below num_shards {self.num_shards}",
        )

    @property
    def folder(self) -> str:
        """The folder of the judgements."""
        return self.output or f"{self.candidates}.judgements"
