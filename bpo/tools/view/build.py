"""Builds the page: reads, has records worked on by processes a few at a time, writes as they come."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.job.merge import sibling_path
from bpo.config.bootstrap import WeakenConfig
from bpo.formats.bad_records import BadRecords
from bpo.records import PreferenceGroup
from bpo.tools.groups import bad_records_from, iterate_groups, sample, write_bad_records
from bpo.tools.view.entries import REFUSED_ADVICE, SCORES_ADVICE, check_refused, entry_of, refused_only, token_scores
from bpo.tools.view.page import PageWriter
from bpo.tools.view.pictures import make_pictures, no_pictures
from bpo.tools.view.reading import LinesById
from bpo.tools.view.summary import COUNTED_GROUPS, Counting, SourceFigures, read_summary

BATCH_RECORDS = 16
# Batches that are under way or wait to be written, for each process.
BATCHES_AHEAD = 3


@dataclass(frozen=True, slots=True)
class Worker:
    """What a process needs to know to make the entry of a record.

    Attributes:
        image_root: None where no pictures are made.
        lexicon: File of the lexicon; empty for the shipped one.
    """

    image_root: Path | None
    folder: Path
    lexicon: str

    def __call__(self, batch: list[Task]) -> list[dict[str, Any]]:
        return [self.entry(task) for task in batch]

    def entry(self, task: Task) -> dict[str, Any]:
        group, lexicon = task.group, load_lexicon(self.lexicon).objects
        if self.image_root is None:
            pictures = no_pictures(group)
        else:
            pictures = make_pictures(task.number, group, self.image_root, self.folder, WeakenConfig())
        scores = {response: one for line in task.scores for response, one in token_scores(line).items()}
        return entry_of(group, task.refused, scores, lexicon, pictures)


@dataclass(frozen=True, slots=True)
class Task:
    """A group with the lines that belong to it."""

    number: int
    group: PreferenceGroup
    refused: list[dict[str, Any]]
    scores: list[dict[str, Any]]


def build_page(chosen: argparse.Namespace, folder: Path) -> Path:
    """Writes the page that the command's options ask for into `folder`; returns its index.html.

    Raises:
        ValueError: A file has another form, too many records are bad, or the folder holds something else.
    """
    inputs = _Inputs(chosen)
    objects = load_lexicon(chosen.lexicon).objects
    writer = PageWriter(folder, os.fsencode(chosen.data.name).decode("utf-8", "replace"))
    worker = Worker(None if chosen.no_images else chosen.image_root, folder, chosen.lexicon)
    for entry in tqdm(in_order(worker, inputs.tasks(), chosen.workers), desc="records", unit="record"):
        inputs.look_at(entry)
        writer.add(entry)
    for record_id, lines in inputs.without_group():
        writer.add(refused_only(record_id, lines, objects))
    statistics = writer.statistics
    statistics.lengths = inputs.counting.lengths()
    statistics.sources, statistics.origin = inputs.figures(statistics.refused)
    statistics.problems = inputs.bad_records().problems
    write_bad_records(folder / "quarantine.jsonl", inputs.bad_records())
    for warning in inputs.warnings(folder):
        tqdm.write(warning, file=sys.stderr)
    return writer.finish()


class _Inputs:
    """The files of a page: groups one at a time, with the lines that belong to each; and what is wrong with them."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen = chosen
        self._bad = {name: bad_records_from(chosen) for name in ("groups", "refused", "scores")}
        if chosen.scores and not chosen.scores.exists():
            raise ValueError(f"{chosen.scores} is missing; {SCORES_ADVICE}")
        refused = sibling_path(chosen.data, "refused.jsonl")
        self._refused = LinesById(refused, check_refused, self._bad["refused"], REFUSED_ADVICE)
        self._scores = LinesById(chosen.scores, token_scores, self._bad["scores"], SCORES_ADVICE)
        for name, lines in (("refused", self._refused), ("scores", self._scores)):
            self._bad[name].check_share(lines.num_lines, str(lines.path), advice="make it again")
        self._summary = sibling_path(chosen.data, "summary.json")
        self._known, self._summary_error = _usable_summary(self._summary)
        self.counting = Counting(changes=not self._known)
        self._with_group: set[str] = set()
        self._num_scored = 0
        self._unseen: list[str] = []

    def tasks(self) -> Iterator[Task]:
        groups = sample(iterate_groups(self.chosen.data, self._bad["groups"]), self.chosen.limit)
        for number, group in enumerate(groups):
            refused = self._refused.get(group.id)
            if refused:
                self._with_group.add(group.id)
            self.counting.add(group)
            yield Task(number, group, refused, self._scores.get(group.id))

    def without_group(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Records of which everything was refused; none beside a sample."""
        for record_id in () if self.chosen.limit else self._refused:
            if record_id not in self._with_group:
                yield record_id, self._refused.get(record_id)

    def look_at(self, entry: dict[str, Any]) -> None:
        self._num_scored += any("tokens" in completion for completion in entry["completions"])
        self._unseen += [image["error"] for image in entry["images"] if image["error"]]

    def figures(self, refused: Counter[tuple[str, str]]) -> tuple[list[SourceFigures], str]:
        """The figures of each source, and where they come from."""
        if self._known:
            return self._known, f"Of all records, as bpo bootstrap counted them in {self._summary.name}."
        by_source: dict[str, dict[str, int]] = {}
        for (source, reason), count in refused.items():
            by_source.setdefault(source, {})[reason] = count
        what = f"Of the groups on this page, changes of {COUNTED_GROUPS:,} of them at most."
        return self.counting.sources(by_source, load_lexicon(self.chosen.lexicon)), what

    def bad_records(self) -> BadRecords:
        return BadRecords("quarantine", 1.0, [problem for bad in self._bad.values() for problem in bad.problems])

    def warnings(self, folder: Path) -> Iterator[str]:
        if self._summary_error:
            yield f"figures are counted here, for {self._summary_error}"
        problems = self.bad_records().problems
        if problems:
            where = "on the page" if self.chosen.serve else f"in {folder / 'quarantine.jsonl'}"
            yield f"left out: {len(problems):,} bad records, listed {where}; the first: {problems[0].detail}"
        if self._unseen:
            yield f"not shown: {len(self._unseen):,} images; the first: {self._unseen[0]}"
        if self.chosen.scores and not self._num_scored:
            yield f"no completion of {self.chosen.data} has scores in {self.chosen.scores}: are they of these groups?"


def _usable_summary(path: Path) -> tuple[list[SourceFigures], str]:
    """The figures of a summary, or none and what is wrong with it."""
    try:
        return [one for one in read_summary(path) if one.kept is not None or one.refused or one.similarity], ""
    except (ValueError, OSError) as error:
        return [], str(error)


def in_order(worker: Worker, tasks: Iterable[Task], num_processes: int) -> Iterator[dict[str, Any]]:
    """The entries of all tasks in order; a bounded number of tasks is taken ahead."""
    tasks = iter(tasks)
    batches = iter(lambda: list(islice(tasks, BATCH_RECORDS)), [])
    if num_processes <= 1:
        for batch in batches:
            yield from worker(batch)
        return
    waiting: deque[Future[list[dict[str, Any]]]] = deque()
    with ProcessPoolExecutor(num_processes, initializer=_prepare_process) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(worker, batch))
                if len(waiting) >= BATCHES_AHEAD * num_processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _prepare_process() -> None:
    """Interrupts are the parent's; and a thread for each process, which share the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
