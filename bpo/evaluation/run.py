"""`bpo evaluate`: answers a suite with one model, scores it, writes answers and metrics as JSON, prints a table."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.config.adapter import split_adapter
from bpo.config.evaluation import EvaluationConfig
from bpo.config.training import Config
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import answer_requests, requests_of
from bpo.evaluation.given_answers import read_answers
from bpo.evaluation.grid import answer_grid, score_grid
from bpo.evaluation.provenance import decoding_of, model_provenance, run_provenance
from bpo.evaluation.results import BenchmarkResult, flat_metrics, score_benchmark, score_suite
from bpo.evaluation.suite import Suite, read_suite, with_usable_images
from bpo.evaluation.tables import format_results
from bpo.formats.bad_records import BadRecords
from bpo.formats.images import image_identities
from bpo.job.compile_locks import named_compile_locks
from bpo.job.durable import write_durably
from bpo.job.launch import Ranks, ranks_from_environment, restart_count
from bpo.job.restarts import RestartCount
from bpo.job.signals import StopRequest
from bpo.model.reference.fingerprint import loaded_files

if TYPE_CHECKING:
    from bpo.data.encode import Encoder
    from bpo.model.decoding.cost import DecodingCost

logger = logging.getLogger(__name__)


@named_compile_locks()
def run_evaluation(config: Config, progress: bool = True, stop: StopRequest | None = None) -> dict[str, Any]:
    """Loads the model or PEFT adapter, answers `config.evaluation`'s suite, writes `evaluation.output`, prints a table.

    Ranks and shards share the questions. A killed or interrupted job that is restarted with the same model, questions
    and options reuses the finished answers, which are stored in `OUTPUT.answers` until the end. With
    `evaluation.answers`, no model is loaded: the answers of that file are scored.

    Returns:
        The object that was written (docs/evaluation.md); on ranks other than 0 an empty one.

    Raises:
        ValueError: No benchmark or output is configured, a file has the wrong format, or an image is unusable and
            `data.on_bad` is error; all found before the model is loaded.
        TooManyBadRecords: More images are unusable than `data.max_bad_share` allows.
        TimeoutError: On rank 0, if the other ranks' answers stop arriving.
        Interrupted: `stop` was received; finished batches are kept.
        NoProgressError: SLURM restarts the job repeatedly without new answers.
    """
    options = config.evaluation
    if not options.output:
        raise ValueError("evaluation.output is empty; name a JSON file for the results")
    started = time.monotonic()
    suite = read_suite(options)
    ranks = _with_shards(ranks_from_environment(), options)
    if not options.answers:
        results, about = _generate(config, suite, ranks, progress, stop)
    elif ranks.is_main:
        given = read_answers(Path(options.answers), suite)
        results = [score_benchmark(*pair) for pair in zip(suite.benchmarks, given, strict=True)]
        about = {"answers": options.answers}
    if not ranks.is_main:
        return {}
    tree = {
        "suite": suite.name,
        **about,
        **run_provenance(config, ranks),
        "seconds": round(time.monotonic() - started, 3),
        "metrics": flat_metrics(results),
        "benchmarks": [result.to_json() for result in results],
    }
    write_results(Path(options.output), tree, results)
    if not options.answers:
        shutil.rmtree(_answers_folder(options))
    print(format_results(results))
    print(f"All answers and metrics: {options.output}")
    return tree


def _generate(
    config: Config, suite: Suite, ranks: Ranks, progress: bool, stop: StopRequest | None
) -> tuple[list[BenchmarkResult], dict[str, Any]]:
    """Results of the model's answers, and what they depend on; empty on ranks other than 0."""
    from bpo.data.encode import load_encoder
    from bpo.job.launch import pick_device
    from bpo.model.decoding.cost import DecodingCost
    from bpo.model.inference import load_for_inference

    options = config.evaluation
    bad = BadRecords.from_config(config.data)
    suite = with_usable_images(suite, Path(config.data.image_root or "."), bad)
    folder = _answers_folder(options)
    journal = AnswerJournal(folder / _identity(config, suite), ranks, stop)
    if ranks.is_main and restart_count():
        count = RestartCount(folder, progress="answer {}", option="evaluation.max_idle_restarts")
        count.start(len(journal), options.max_idle_restarts)
    base, adapter = split_adapter(config.model)
    encoder = load_encoder(replace(config, model=base))
    model = load_for_inference(base, adapter, pick_device())
    cost = DecodingCost()
    answer_suite(model, encoder, suite, options, journal, progress=progress, cost=cost)
    if not ranks.is_main:
        return [], {}
    about = model_provenance(config, base.path, adapter, encoder)
    about["cost"] = cost.to_json()
    about["bad_images"] = [problem.to_json() for problem in bad.problems]
    if options.decoding == "grid":
        grid = score_grid(suite, journal, options)
        about["grid"] = [result.to_json() for result in grid]
        print("\n".join(map(str, grid)))
    elif options.decoding != "plain":
        print(f"{options.decoding}: {cost}")
    return score_suite(suite, journal, options), about


def evaluate_model(
    model: Any, encoder: Encoder, suite: Suite, options: EvaluationConfig, *, progress: bool = True
) -> list[BenchmarkResult]:
    """Answers and scores a suite in this process.

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        encoder: Encoder of the same model.
        suite: From `read_suite`.
        options: Batch size and decoding.
    """
    journal = AnswerJournal()
    answer_suite(model, encoder, suite, options, journal, progress=progress)
    return score_suite(suite, journal, options)


def answer_suite(
    model: Any,
    encoder: Encoder,
    suite: Suite,
    options: EvaluationConfig,
    journal: AnswerJournal,
    *,
    progress: bool = True,
    cost: DecodingCost | None = None,
) -> None:
    """Generates this rank's share of the missing answers of all benchmarks; raises as `answer_requests` does."""
    requests = [request for benchmark in suite.benchmarks for request in requests_of(benchmark, options)]
    answer_requests(model, encoder, requests, journal, options, progress=progress, cost=cost)
    if options.decoding == "grid":
        answer_grid(model, encoder, suite, options, journal, progress=progress, cost=cost)


def write_results(output: Path, tree: dict[str, Any], results: Sequence[BenchmarkResult]) -> None:
    """Writes the results, and beside them the answers in the form that the official scorer of each benchmark reads."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for result in results:
        if official := result.benchmark.answer_file(result.answers):
            suffix, content = official
            name = result.benchmark.name.replace("/", "-").replace(" ", "-")
            write_durably(output.with_name(f"{output.stem}.{name}{suffix}"), content)
    write_durably(output, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def _answers_folder(options: EvaluationConfig) -> Path:
    output = Path(options.output)
    return output.with_name(output.name + ".answers")


def _with_shards(ranks: Ranks, options: EvaluationConfig) -> Ranks:
    """The ranks of all shards together: rank 0 of shard 0 scores."""
    rank = options.shard_index * ranks.world_size + ranks.rank
    return Ranks(rank, options.num_shards * ranks.world_size, ranks.local_rank)


def _identity(config: Config, suite: Suite) -> str:
    """16 hexadecimal digits of everything that answers depend on; names their folder, so that answers are never stale.

    Model files and images count by name, size and time: hashing them could take longer than the evaluation.
    """
    options, data = config.evaluation, config.data
    base, adapter = split_adapter(config.model)
    files = [file for folder in (base.path, adapter) if Path(folder).is_dir() for file in loaded_files(Path(folder))]
    parts = [
        [base.path, adapter],
        config.model.dtype,
        data.image_root,
        [data.min_pixels, data.max_pixels, data.image_aspect, data.system_prompt],
        options.batch_size,
        decoding_of(options),
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        image_identities(suite.images, Path(data.image_root or ".")),
        [request.key for benchmark in suite.benchmarks for request in requests_of(benchmark, options)],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
