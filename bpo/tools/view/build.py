"""Builds the page: a process pool turns records into page entries, which are written in order."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.job.merge import sibling_path
from bpo.config.bootstrap import WeakenConfig
from bpo.formats.bad_records import BadRecords
from bpo.job.terminal import printable
from bpo.records import PreferenceGroup
from bpo.tools.groups import bad_records_from, iterate_groups, sample, write_bad_records
from bpo.tools.measures import TypeMeasures, read_measures
from bpo.tools.view.entries import REFUSED_ADVICE, SCORES_ADVICE, check_refused, entry_of, refused_only, token_scores
from bpo.tools.view.measures import VALUES_ADVICE, check_values
from bpo.tools.view.page import PageWriter
from bpo.tools.view.pictures import make_pictures, no_pictures
from bpo.tools.view.reading import LinesById
from bpo.tools.view.summary import COUNTED_GROUPS, Counting, SourceFigures, read_summary

BATCH_RECORDS = 16
# Batches per process that are in progress or waiting to be written.
BATCHES_AHEAD = 3


@dataclass(frozen=True, slots=True)
class Worker:
    """Settings of a worker process; calling it turns a batch of tasks into page entries.

    Attributes:
        image_root: None if no pictures are made.
        lexicon: Lexicon file; empty for the built-in lexicon.
        measures: Completion type -> measures, for the n-grams that tell the answers apart.
    """

    image_root: Path | None
    folder: Path
    lexicon: str
    measures: Mapping[str, TypeMeasures] = field(default_factory=dict)

    def __call__(self, batch: list[Task]) -> list[dict[str, Any]]:
        return [self.entry(task) for task in batch]

    def entry(self, task: Task) -> dict[str, Any]:
        group, lexicon = task.group, load_lexicon(self.lexicon).objects
        if self.image_root is None:
            pictures = no_pictures(group)
        else:
            pictures = make_pictures(task.number, group, self.image_root, self.folder, WeakenConfig())
        scores = {response: score for line in task.scores for response, score in token_scores(line).items()}
        return entry_of(group, task.refused, scores, lexicon, pictures, task.values, self.measures)


@dataclass(frozen=True, slots=True)
class Task:
    """A group with its refused completions, scores and log-probs of `bpo measure`."""

    number: int
    group: PreferenceGroup
    refused: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    values: list[dict[str, Any]] = field(default_factory=list)


def build_page(options: argparse.Namespace, folder: Path) -> Path:
    """Writes the page for the command's options to `folder`; returns the path of its index.html.

    Raises:
        ValueError: A file has an unexpected format, too many records are bad, or the folder contains other files.
    """
    inputs = _Inputs(options)
    objects = load_lexicon(options.lexicon).objects
    writer = PageWriter(folder, os.fsencode(options.data.name).decode("utf-8", "replace"))
    worker = Worker(None if options.no_images else options.image_root, folder, options.lexicon, inputs.measures)
    for entry in tqdm(in_order(worker, inputs.tasks(), options.workers), desc="records", unit="record"):
        inputs.count(entry)
        writer.add(entry)
    for record_id, lines in inputs.without_group():
        writer.add(refused_only(record_id, lines, objects))
    statistics = writer.statistics
    statistics.lengths = inputs.counting.lengths()
    statistics.sources, statistics.origin = inputs.figures(statistics.refused)
    statistics.measures = inputs.measures
    statistics.problems = inputs.bad_records().problems
    write_bad_records(folder / "quarantine.jsonl", inputs.bad_records())
    for warning in inputs.warnings(folder):
        tqdm.write(printable(warning), file=sys.stderr)
    return writer.finish()


class _Inputs:
    """The input files of a page: tasks (group, refusals, scores), figures by source, warnings."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self._bad = {name: bad_records_from(options) for name in ("groups", "refused", "scores", "values")}
        if options.scores and not options.scores.exists():
            raise ValueError(f"{options.scores} is missing; {SCORES_ADVICE}")
        refused = sibling_path(options.data, "refused.jsonl")
        self._refused = LinesById(refused, check_refused, self._bad["refused"], REFUSED_ADVICE)
        self._scores = LinesById(options.scores, token_scores, self._bad["scores"], SCORES_ADVICE)
        values = sibling_path(options.data, "measures.jsonl")
        self._values = LinesById(values, check_values, self._bad["values"], VALUES_ADVICE)
        for name, lines in (("refused", self._refused), ("scores", self._scores), ("values", self._values)):
            self._bad[name].check_share(lines.num_lines, str(lines.path), advice="create the file again")
        self._summary = sibling_path(options.data, "summary.json")
        self._known, self._summary_error = _usable_summary(self._summary)
        self.measures, self._measures_error = _usable_measures(options.data)
        self.counting = Counting(changes=not self._known)
        self._with_group: set[str] = set()
        self._num_scored = 0
        self._unseen: list[str] = []

    def tasks(self) -> Iterator[Task]:
        groups = sample(iterate_groups(self.options.data, self._bad["groups"]), self.options.limit)
        for number, group in enumerate(groups):
            refused = self._refused.get(group.id)
            if refused:
                self._with_group.add(group.id)
            self.counting.add(group)
            yield Task(number, group, refused, self._scores.get(group.id), self._values.get(group.id))

    def without_group(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Records whose completions were all refused; none if the page shows a sample."""
        for record_id in () if self.options.limit else self._refused:
            if record_id not in self._with_group:
                yield record_id, self._refused.get(record_id)

    def count(self, entry: dict[str, Any]) -> None:
        self._num_scored += any("tokens" in completion for completion in entry["completions"])
        self._unseen += [image["error"] for image in entry["images"] if image["error"]]

    def figures(self, refused: Counter[tuple[str, str]]) -> tuple[list[SourceFigures], str]:
        """The figures of each source, and their origin."""
        if self._known:
            return self._known, f"All records, as counted by bpo bootstrap in {self._summary.name}."
        by_source: dict[str, dict[str, int]] = {}
        for (source, reason), count in refused.items():
            by_source.setdefault(source, {})[reason] = count
        origin = f"The groups on this page; changes are counted in at most {COUNTED_GROUPS:,} of them."
        return self.counting.sources(by_source, load_lexicon(self.options.lexicon)), origin

    def bad_records(self) -> BadRecords:
        return BadRecords("quarantine", 1.0, [problem for bad in self._bad.values() for problem in bad.problems])

    def warnings(self, folder: Path) -> Iterator[str]:
        if self._summary_error:
            yield f"summary not used, figures counted from the groups: {self._summary_error}"
        if self._measures_error and not self._summary_error:
            yield f"measures not shown: {self._measures_error}"
        problems = self.bad_records().problems
        if problems:
            where = "on the page" if self.options.serve else f"in {folder / 'quarantine.jsonl'}"
            yield f"skipped {len(problems):,} bad records, listed {where}; first: {problems[0].detail}"
        if self._unseen:
            yield f"{len(self._unseen):,} images not shown; first: {self._unseen[0]}"
        if self.options.scores and not self._num_scored:
            yield f"{self.options.scores} has no scores for completions of {self.options.data}: is it the right file?"


def _usable_summary(path: Path) -> tuple[list[SourceFigures], str]:
    """The figures of a summary and an empty error, or no figures and the error."""
    try:
        return [
            source for source in read_summary(path) if source.kept is not None or source.refused or source.similarity
        ], ""
    except (ValueError, OSError) as error:
        return [], str(error)


def _usable_measures(groups: Path) -> tuple[dict[str, TypeMeasures], str]:
    """The measures of each type and an empty error, or none and the error."""
    try:
        return read_measures(groups), ""
    except (ValueError, OSError) as error:
        return {}, str(error)


def in_order(worker: Worker, tasks: Iterable[Task], num_processes: int) -> Iterator[dict[str, Any]]:
    """Yields the entries of all tasks in order; prefetches a bounded number of tasks."""
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
    """Leaves SIGINT to the parent process, and uses one thread per process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
