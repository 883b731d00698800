"""`bpo judge`: asks a judge about the answers of the base and of other models, and compares each model with the base.

The judge's name as the server reports it, the digest of the prompt, and every reply with its date are part of the
results: scores of different judges, or of one judge at different times, are not comparable.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bpo.config.training import Config
from bpo.evaluation.benchmark import Benchmark, Scores, Sums, ratio
from bpo.evaluation.intervals import UnitCounts, count_units, metric_intervals, paired_differences, values_of
from bpo.evaluation.judge.models import BASE, read_models
from bpo.evaluation.judge.prompt import JudgePrompt
from bpo.evaluation.judge.replies import JudgeReply, ReplyJournal
from bpo.evaluation.judge.requests import JudgeRequest, RequestMaker
from bpo.evaluation.judge.rule import Rule
from bpo.evaluation.judge.rules import RULES
from bpo.evaluation.results import settings_of
from bpo.evaluation.suite import read_suite
from bpo.evaluation.tables import align
from bpo.job.chat_server import ChatServer
from bpo.job.durable import write_durably
from bpo.job.run_record import versions
from bpo.job.signals import StopRequest

logger = logging.getLogger(__name__)

# Between the first and the last reply of a comparison.
_MAX_AGE = timedelta(days=3)
# Of one model: per run, per question; None where the rule needs no judge.
Requests = list[list["JudgeRequest | None"]]


@dataclass(frozen=True)
class Judged:
    """The verdicts on one model's answers.

    Attributes:
        items: JSON objects, one per question: as in `Scores.items`, with `verdicts` and `replies`, one of each per run.
        runs: Counts by unit of each run.
        counts: Counts by unit of all runs together.
    """

    items: list[dict[str, Any]]
    runs: list[UnitCounts]
    counts: UnitCounts


def run_judge(config: Config, stop: StopRequest | None = None) -> dict[str, Any]:
    """Judges, writes `judge.output` and prints a table.

    Replies are kept in `judge.cache` as they come; a run that was interrupted asks only for the missing ones.

    Returns:
        The object that was written (docs/evaluation.md).

    Raises:
        ValueError: An option, a file or an answer is missing or has another form, or the server refused requests.
        ServerError: The server cannot be used.
        Interrupted: A signal was received; all replies are kept.
    """
    options = config.judge
    for name, value in (("output", options.output), ("prompt", options.prompt), ("server.url", options.server.url)):
        if not value:
            raise ValueError(f"judge.{name} is empty; set it (bpo judge --help)")
    benchmark = chosen_benchmark(read_suite(config.evaluation).benchmarks, options.benchmark)
    models = read_models(options.base, options.answers, benchmark)
    kind = RULES[benchmark.options.type]
    prompt = JudgePrompt.read(Path(options.prompt), kind.placeholders, kind.needed)
    rule = kind(benchmark)
    maker = RequestMaker(options, rule, prompt, Path(config.data.image_root or "."))
    requests = {name: requests_of(maker, benchmark, name, answers) for name, answers in models.items()}
    journal = ReplyJournal(Path(options.cache or f"{options.output}.replies.jsonl"))
    _ask(journal, ChatServer(options.server), requests, stop)
    judged = {
        name: judge_answers(rule, benchmark, answers, requests[name], journal.replies)
        for name, answers in models.items()
    }
    tree = {"judge": _about(config, requests, journal), "benchmark": _about_benchmark(benchmark), "base": BASE}
    tree |= {"models": results_of(rule, judged), "versions": versions()}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    print(format_judged(tree))
    print(f"All replies, verdicts and metrics: {output}")
    return tree


def chosen_benchmark(benchmarks: Sequence[Benchmark], name: str) -> Benchmark:
    """The benchmark of this name or type, or the only one that has a rule.

    Raises:
        ValueError: There is none, or several.
    """
    can_be_judged = [benchmark for benchmark in benchmarks if benchmark.options.type in RULES]
    found = [b for b in can_be_judged if not name or name in (b.name, b.options.name or b.options.type)]
    if len(found) != 1:
        listed = ", ".join(benchmark.name for benchmark in can_be_judged) or "none"
        raise ValueError(
            f"judge.benchmark is {name!r}; it must name one of the suite's benchmarks that can be judged ({listed}). "
            f"Types that can be judged are {', '.join(sorted(RULES))}"
        )
    return found[0]


def requests_of(maker: RequestMaker, benchmark: Benchmark, model: str, answers: Sequence[str]) -> Requests:
    """The requests about one model's answers."""
    pairs = list(zip(benchmark.questions, answers, strict=True))
    return [
        [None if maker.rule.settled(a) else maker.request(model, question, a, run) for question, a in pairs]
        for run in range(maker.options.num_runs)
    ]


def _ask(journal: ReplyJournal, server: ChatServer, requests: Mapping[str, Requests], stop: StopRequest | None) -> None:
    wanted = [request for of_model in requests.values() for run in of_model for request in run if request is not None]
    distinct = {request.key for request in wanted}
    with tqdm(total=len(distinct), initial=len(distinct & journal.replies.keys()), desc="judging", unit="reply") as bar:

        def received() -> None:
            bar.update()
            if stop is not None:
                stop.check(f"{len(journal.replies)} replies are kept")

        journal.ask(server, wanted, received)


def judge_answers(
    rule: Rule, benchmark: Benchmark, answers: Sequence[str], requests: Requests, replies: Mapping[str, JudgeReply]
) -> Judged:
    """Reads the replies about one model's answers."""
    questions = benchmark.questions
    items = [
        question.item(answer, verdicts=[], replies=[]) for question, answer in zip(questions, answers, strict=True)
    ]
    rows: list[list[tuple[str, Mapping[str, float]]]] = []
    for run in requests:
        verdicts = []
        for question, answer, request, item in zip(questions, answers, run, items, strict=True):
            reply = replies[request.key] if request else None
            verdict = rule.read(question, answer, reply.text if reply else "")
            verdicts.append(verdict)
            item["verdicts"].append(verdict)
            item["replies"].append(reply.to_json() if reply else None)
        unreadable = [
            (question.resampled, {"replies": 1.0, "unreadable_replies": float(verdict is None)})
            for question, verdict in zip(questions, verdicts, strict=True)
        ]
        rows.append([*rule.rows(questions, answers, verdicts), *unreadable])
    return Judged(
        items,
        [count_units(questions, answers, Scores(tuple(run), ())) for run in rows],
        count_units(questions, answers, Scores(tuple(row for run in rows for row in run), ())),
    )


def results_of(rule: Rule, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """For each model metrics with intervals, differences to the base, counts, and the items."""

    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return rule.metrics(sums) | {"unreadable": ratio(sums["unreadable_replies"], sums["replies"])}

    tree: dict[str, Any] = {}
    for name, found in judged.items():
        differences = {} if name == BASE else paired_differences(judged[BASE].counts, found.counts, metrics)
        runs = [{key: float(value) for key, value in values_of(metrics, run.sums()).items()} for run in found.runs]
        unreadable = [item["id"] for item in found.items if None in item["verdicts"]]
        if unreadable:
            logger.warning("%s: %d answers have unreadable replies, such as %s", name, len(unreadable), unreadable[0])
        tree[name] = {
            "metrics": _with_intervals(metric_intervals(found.counts, metrics)),
            "differences": _with_intervals(differences),
            "runs": runs,
            "unreadable": unreadable,
            "lower_is_better": sorted({*rule.lower_is_better, "unreadable"}),
            "counts": found.counts.to_json(),
            "items": found.items,
        }
    return tree


def _with_intervals(values: Mapping[str, tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"value": value, "low": low, "high": high} for name, (value, low, high) in values.items()}


def _about(config: Config, requests: Mapping[str, Requests], journal: ReplyJournal) -> dict[str, Any]:
    """The judge: whatever the replies depend on, and when they were received."""
    options = config.judge
    keys = {request.key for of_model in requests.values() for run in of_model for request in run if request}
    replies = [journal.replies[key] for key in keys]
    models, dates = sorted({reply.model for reply in replies}), [reply.date for reply in replies]
    if len(models) > 1:
        logger.warning("several models replied: %s; their verdicts may differ", ", ".join(models))
    if dates and datetime.fromisoformat(max(dates)) - datetime.fromisoformat(min(dates)) > _MAX_AGE:
        logger.warning(
            "the replies are from %s to %s, and judges drift: for a fair comparison with the base, ask for all of them "
            "again with another judge.cache",
            min(dates),
            max(dates),
        )
    return {
        "requested_model": options.server.model,
        "models": models,
        "prompt": options.prompt,
        "prompt_sha256": hashlib.sha256(Path(options.prompt).read_bytes()).hexdigest(),
        "system_prompt": options.system_prompt,
        "images": options.images,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "num_runs": options.num_runs,
        "first_reply": min(dates, default=""),
        "last_reply": max(dates, default=""),
        "num_truncated": sum(not reply.finished for reply in replies),
    }


def _about_benchmark(benchmark: Benchmark) -> dict[str, Any]:
    return {"type": benchmark.options.type, "settings": settings_of(benchmark)}


def format_judged(tree: Mapping[str, Any]) -> str:
    """A block per model: metrics with intervals, and differences to the base."""
    judge = tree["judge"]
    lines = [f"{tree['benchmark']['type']}, judged by {', '.join(judge['models'])}; runs: {judge['num_runs']}"]
    for name, result in tree["models"].items():
        rows = [["  ", "value", "interval", "minus base", "interval", ""]]
        for metric, values in result["metrics"].items():
            difference = result["differences"].get(metric)
            lower = "lower is better" if metric in result["lower_is_better"] else ""
            rows.append([f"  {metric}", *_cells(values), *(_cells(difference) if difference else ("", "")), lower])
        lines += ["", name, *align(rows)]
    return "\n".join(lines)


def _cells(values: Mapping[str, float]) -> tuple[str, str]:
    return f"{values['value']:.3f}", f"[{values['low']:.3f}, {values['high']:.3f}]"
