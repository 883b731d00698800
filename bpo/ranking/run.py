"""`bpo rank`: a judge scores the completions of a groups file; any number of processes share the groups, resumable.

Processes claim batches of groups in file order and append the results of each to their own journal. A pass begins when
every group has a result of the one before. The process that finds every group judged writes quarantine.jsonl, then
summary.json.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from bpo.bootstrap.job.leases import Leases
from bpo.config.io import check_inputs
from bpo.config.training import Config
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import iterate_groups
from bpo.job.durable import write_durably
from bpo.job.exits import JobError
from bpo.job.journal import to_line
from bpo.job.launch import ranks_from_environment
from bpo.job.signals import StopRequest
from bpo.ranking.judge import Failed, Judge, Scored
from bpo.ranking.judgements import RESULT, Judgements, JudgementWriter, group_digest, open_judgements
from bpo.ranking.judges.registry import make_judge
from bpo.records import PreferenceGroup

logger = logging.getLogger(__name__)

_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class RankSummary:
    """What a process knows at its end; summary.json, once every group has a result.

    Attributes:
        failed: Reason, up to its first colon -> groups that cannot be judged.
        num_bad_records: Unusable records of the file, which are no groups.
        seconds: Pass -> seconds that this process spent on it in this run.
        identity: See `Judgements`.
    """

    folder: str
    num_groups: int
    num_judged: int
    failed: dict[str, int]
    num_bad_records: int
    seconds: dict[str, float]
    identity: dict[str, object]

    @property
    def is_finished(self) -> bool:
        return self.num_judged + sum(self.failed.values()) == self.num_groups


class GroupSpool:
    """Groups in a temporary file, readable by position; memory holds their `keys`: id and `group_digest`."""

    def __init__(self, groups: Iterable[PreferenceGroup]):
        self._file = tempfile.TemporaryFile(prefix="bpo-groups-")  # noqa: SIM115 open as long as this object
        self._starts = array("Q")
        self.keys: list[tuple[str, str]] = []
        for group in groups:
            self._starts.append(self._file.tell())
            pickle.dump(group, self._file, protocol=pickle.HIGHEST_PROTOCOL)
            self.keys.append((group.id, group_digest(group)))

    def __getitem__(self, place: int) -> PreferenceGroup:
        self._file.seek(self._starts[place])
        group: PreferenceGroup = pickle.load(self._file)
        return group


def run_rank(config: Config, stop: StopRequest | None = None, progress: bool = True) -> RankSummary:
    """Judges `rank.candidates` and writes `rank.folder`; a restarted job judges only what has no result yet.

    Raises:
        ValueError: An option is missing or refused, the folder has judgements of another judge or of other candidates,
            or a group cannot be judged and `data.on_bad` is error.
        TooManyBadRecords: More records are unusable or not judged than `data.max_bad_share` allows.
        JobError: The judge cannot go on, such as a server that is away.
        TimeoutError: Other processes hold batches and have finished none for `rank.stall_timeout_s`.
        Interrupted: `stop` was received; every finished batch is kept.
    """
    check_inputs(config, ("rank.candidates",))
    bad = BadRecords.from_config(config.data)
    groups = GroupSpool(iterate_groups(Path(config.rank.candidates), bad))
    return judge_groups(config, groups, bad, Path(config.rank.folder), stop, progress)


def judge_groups(
    config: Config, groups: GroupSpool, bad: BadRecords, folder: Path, stop: StopRequest | None, progress: bool
) -> RankSummary:
    """Judges groups into a folder; see `run_rank`."""
    options, ranks = config.rank, ranks_from_environment()
    judge, plugin = make_judge(config, ranks)
    known = open_judgements(folder, options.judge, judge.identity() | plugin)
    worker = options.shard_index * ranks.world_size + ranks.rank
    leases = Leases(folder / "claims", f"worker-{worker:05d}", options.claim_timeout_s)
    seconds: dict[str, float] = {}
    with JudgementWriter(folder, worker) as writer, leases:
        work = _Worker(config, judge, groups, known, writer, leases, stop)
        for name in judge.passes:
            started_s = time.monotonic()
            waits = name != judge.passes[-1] or (ranks.is_main and options.num_shards == 1)
            shown = progress and ranks.is_main
            with tqdm(total=len(groups.keys), desc=name, unit="group", disable=not shown) as bar:
                work.run(name, bar, waits=waits)
            seconds[name] = round(time.monotonic() - started_s, 3)
    return _summary(folder, groups, known, bad, seconds)


@dataclass(frozen=True)
class _Worker:
    """One process: judges the batches that it can claim."""

    config: Config
    judge: Judge
    groups: GroupSpool
    known: Judgements
    writer: JudgementWriter
    leases: Leases
    stop: StopRequest | None

    def run(self, name: str, bar: tqdm, *, waits: bool) -> None:
        """One pass; `waits` until the batches of other processes are finished, or free again."""
        options, num_groups = self.config.rank, len(self.groups.keys)
        starts = range(0, num_groups, options.batch_size)
        left = [range(start, min(start + options.batch_size, num_groups)) for start in starts]
        num_known, changed_s = -1, 0.0
        while (left := [places for places in left if not self._finish(name, places, bar)]) and waits:
            self._check_stop()
            if self.known.poll() != num_known:
                num_known, changed_s = self.known.poll(), time.monotonic()
            elif time.monotonic() - changed_s > options.stall_timeout_s:
                raise TimeoutError(
                    f"{self.known.folder}: {sum(map(len, left))} groups have no result of `{name}`, and the processes "
                    f"that claimed them wrote none for {options.stall_timeout_s:g} s (rank.stall_timeout_s); check "
                    "their logs, then start again: what is judged is kept"
                )
            time.sleep(min(_POLL_S, options.stall_timeout_s))

    def _finish(self, name: str, places: range, bar: tqdm) -> bool:
        """Judges what a batch lacks; False if another process does."""
        if self._missing(name, places):
            claim = f"{name}-{self.config.rank.batch_size}-{places.start:08}"  # other sizes split the work otherwise
            if not self.leases.take(claim):
                return False
            self.known.poll()  # its previous owner may have finished it
            if missing := self._missing(name, places):
                self._check_stop()
                self._judge(name, [self.groups[place] for place in missing])
            self.leases.release(claim)
        bar.update(len(places))
        return True

    def _missing(self, name: str, places: range) -> list[int]:
        return [place for place in places if not self.known.has(*self.groups.keys[place], name)]

    def _judge(self, name: str, groups: list[PreferenceGroup]) -> None:
        """Judges and writes, also what was judged before an error."""
        is_last = name == self.judge.passes[-1]
        results: dict[int, Scored | Failed] = {}
        without = ((n, Failed("no result of the judge")) for n in range(len(groups)) if n not in results)
        try:
            for index, result in chain(self.judge.judge(name, groups), without):
                if is_last and isinstance(result, Scored):
                    result = self.judge.combine({**self._earlier(groups[index]), name: result})
                result = _checked(groups[index], result)
                if isinstance(result, Failed) and self.config.data.on_bad == "error":
                    raise ValueError(
                        f"group {groups[index].id!r} cannot be judged: {result.reason}. Correct it, or set "
                        "data.on_bad=quarantine"
                    )
                results[index] = result
        except JobError:  # a program that the judge runs may have got the same signal as this process
            self._check_stop()
            raise
        finally:
            self.writer.append(RESULT if is_last else name, ((groups[n], results[n]) for n in sorted(results)))
            self.known.poll()

    def _earlier(self, group: PreferenceGroup) -> dict[str, Scored]:
        results = {name: self.known.result(group, name) for name in self.judge.passes[:-1]}
        return {name: result for name, result in results.items() if isinstance(result, Scored)}

    def _check_stop(self) -> None:
        if self.stop is not None:
            self.stop.check("every finished batch is kept")


def _checked(group: PreferenceGroup, result: Scored | Failed) -> Scored | Failed:
    if isinstance(result, Failed):
        return result
    for name, count in (("scores", len(result.scores)), ("details", len(result.details) or len(group.completions))):
        if count != len(group.completions):
            return Failed(f"wrong number of {name}: {count} for {len(group.completions)} completions")
    wrong = [score for score in result.scores if not math.isfinite(score)]
    return Failed(f"a score that is no number: {wrong[0]}") if wrong else result


def _summary(
    folder: Path, groups: GroupSpool, known: Judgements, bad: BadRecords, seconds: dict[str, float]
) -> RankSummary:
    """The summary; written, after the list of failed groups, if every group has a result."""
    failed = {group_id: known.failed[group_id] for group_id, _ in groups.keys if group_id in known.failed}
    num_judged = sum(known.has(*key) for key in groups.keys) - len(failed)
    reasons = dict(Counter(reason.partition(":")[0] for reason in failed.values()).most_common())
    num_groups, num_bad = len(groups.keys), len(bad.problems)
    summary = RankSummary(str(folder), num_groups, num_judged, reasons, num_bad, seconds, known.identity)
    logger.info("%s: %d of %d groups judged, %d failed", folder, num_judged, num_groups, len(failed))
    if summary.is_finished:
        path = folder / "quarantine.jsonl"
        lines = [to_line(problem.to_json()) for problem in bad.problems]
        where = {"where": str(folder), "code": "not-judged"}
        lines += [to_line({**where, "record": group_id, "error": reason}) for group_id, reason in failed.items()]
        write_durably(path, b"".join(lines))
        advice = f"{path} lists them; of the judge: {reasons}"
        bad.check_share(num_groups + num_bad, str(folder), num_bad + len(failed), advice)
        write_durably(folder / "summary.json", json.dumps(asdict(summary), indent=1) + "\n")
    return summary
