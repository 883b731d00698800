"""What a judge is: it scores the completions of groups. A new judge implements `Judge` and is registered.

A judge whose scores need several models in turn (such as the log-ratio of two policies) has several passes: all groups
go through one pass before the next begins, so that one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from bpo.config.training import Config
from bpo.job.launch import Ranks
from bpo.records import PreferenceGroup, Turn


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one group by one pass.

    Attributes:
        scores: One per completion of the group; higher is better.
        details: One JSON object per completion: what the score was made of, such as the claims and their verdicts.
            Judges that label sentences give `sentences`: [{"sentence", "label" (true: hallucinated), "category"}].
    """

    scores: tuple[float, ...]
    details: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a group cannot be judged; it is quarantined."""

    reason: str


def dialogue_of(group: PreferenceGroup) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns that ask, and the complete answers: with the start of the answer, if the prompt ends with one."""
    *turns, last = group.prompt
    start = last.text if last.role == "assistant" else ""
    return tuple(turns) if start else group.prompt, [start + completion.response for completion in group.completions]


class Judge(Protocol):
    """Scores completions; judges are subclasses. Made once per process; raises ValueError for options that it refuses.

    Attributes:
        passes: Names of the passes, in order.
    """

    passes: ClassVar[tuple[str, ...]] = ("scores",)

    def identity(self) -> dict[str, Any]:
        """What scores depend on in addition to the group: options, prompts, fingerprints of models and files."""

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        """(index, result) of each group by the pass `name`, in any order. Results before an error remain valid."""

    def combine(self, results: Mapping[str, Scored]) -> Scored:
        """The scores of a group from the results of all passes; for one pass, its result."""
        (result,) = results.values()
        return result


JudgeFactory = Callable[[Config, Ranks], Judge]


@dataclass(frozen=True, slots=True)
class JudgeDefinition:
    """A registered judge; see `register_judge`."""

    name: str
    make: JudgeFactory


JUDGES: dict[str, JudgeDefinition] = {}


def register_judge(name: str) -> Callable[[JudgeFactory], JudgeFactory]:
    """Registers a class or function that makes a judge under its `rank.judge` name.

    Raises:
        ValueError: The name is taken.
    """

    def add(make: JudgeFactory) -> JudgeFactory:
        if name in JUDGES:
            raise ValueError(f"a judge named {name!r} is already registered")
        JUDGES[name] = JudgeDefinition(name, make)
        return make

    return add


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judged group, as `bpo select` reads it.

    Attributes:
        judge: Name of the judge and digest of its identity, for provenance.
    """

    group_id: str
    scored: Scored
    judge: dict[str, Any] = field(default_factory=dict)
