"""`bpo evaluate`: generate answers, score CHAIR and POPE, write all answers and metrics as JSON, print a table."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.config.training import Config, EvaluationConfig
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import Request, answer_requests
from bpo.evaluation.chair import ChairResult, DescriptionScore, score_descriptions
from bpo.evaluation.files import CocoImages, read_coco, read_pope
from bpo.evaluation.pope import PopeQuestion, PopeResult, says_yes, score_answers
from bpo.formats.bad_records import BadRecords
from bpo.formats.images import ImageError, image_identities, load_image
from bpo.formats.problems import Problem
from bpo.job.compile_locks import named_compile_locks
from bpo.job.durable import write_durably
from bpo.job.launch import ranks_from_environment, restart_count
from bpo.job.restarts import RestartCount
from bpo.job.signals import StopRequest
from bpo.model.reference.fingerprint import loaded_files

if TYPE_CHECKING:
    from bpo.data.encode import Encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """Images to describe and questions to answer; either may be absent."""

    coco: CocoImages | None
    questions: tuple[PopeQuestion, ...]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Results of each benchmark; None if it was not requested."""

    chair: ChairResult | None
    pope: PopeResult | None

    def metrics(self) -> dict[str, float]:
        """The main metrics, if measured: chair_i, chair_s, recall, pope_accuracy, pope_f1, pope_yes_ratio."""
        figures: dict[str, float] = {}
        if self.chair:
            figures |= {"chair_i": self.chair.chair_i, "chair_s": self.chair.chair_s, "recall": self.chair.recall}
        if self.pope:
            average = self.pope.average
            figures |= {
                "pope_accuracy": average.accuracy,
                "pope_f1": average.f1,
                "pope_yes_ratio": average.yes_ratio,
            }
        return figures


@named_compile_locks()
def run_evaluation(config: Config, progress: bool = True, stop: StopRequest | None = None) -> dict[str, Any]:
    """Loads the model, runs the benchmarks of `config.evaluation`, writes `evaluation.output` and prints a table.

    Ranks share the questions. A killed or interrupted job that is restarted with the same model, questions and options
    reuses the finished answers, which are stored in `OUTPUT.answers` until the end.

    Returns:
        The object that was written: `model`, `evaluation` (the options), `metrics`, `chair`, `pope`, `bad_images`,
        `seconds`; on ranks other than 0 an empty one.

    Raises:
        ValueError: No benchmark or output is configured, a file has the wrong format, or an image is unusable and
            `data.on_bad` is error; all found before the model is loaded.
        TooManyBadRecords: More images are unusable than `data.max_bad_share` allows.
        TimeoutError: On rank 0, if the other ranks' answers stop arriving.
        Interrupted: `stop` was received; finished batches are kept.
        NoProgressError: SLURM restarts the job repeatedly without new answers.
    """
    from bpo.data.encode import load_encoder
    from bpo.job.launch import pick_device
    from bpo.model.load import load_model

    if not config.evaluation.output:
        raise ValueError("evaluation.output is empty; name a JSON file for the results")
    started = time.monotonic()
    benchmarks = read_benchmarks(config.evaluation)
    bad = BadRecords.from_config(config.data)
    benchmarks = with_usable_images(benchmarks, Path(config.data.image_root or "."), bad)
    output = Path(config.evaluation.output)
    folder = output.with_name(output.name + ".answers")
    ranks = ranks_from_environment()
    journal = AnswerJournal(folder / _identity(config, benchmarks), ranks, stop)
    if ranks.is_main and restart_count():
        count = RestartCount(folder, progress="answer {}", option="evaluation.max_idle_restarts")
        count.start(len(journal), config.evaluation.max_idle_restarts)
    encoder = load_encoder(config)
    model = load_model(config.model, pick_device())
    give_answers(model, encoder, benchmarks, config.evaluation, journal, progress=progress)
    if not ranks.is_main:
        return {}
    result = score(benchmarks, journal, config.evaluation.stall_timeout_s)
    tree = result_to_json(result, benchmarks)
    tree = {"model": config.model.path, "evaluation": asdict(config.evaluation), **tree}
    tree["bad_images"] = [problem.to_json() for problem in bad.problems]
    tree["seconds"] = round(time.monotonic() - started, 3)
    _write_json(output, tree)
    shutil.rmtree(folder)
    print(format_table(result))
    print(f"All answers and metrics: {config.evaluation.output}")
    return tree


def _identity(config: Config, benchmarks: Benchmarks) -> str:
    """16 hexadecimal digits of everything that answers depend on; names their folder, so that answers are never stale.

    Model files and images count by name, size and time: hashing them could take longer than the evaluation.
    """
    options = config.evaluation
    model = Path(config.model.path)
    files = loaded_files(model) if model.is_dir() else []
    parts = [
        str(model),
        config.model.dtype,
        config.data.image_root,
        [config.data.min_pixels, config.data.max_pixels, config.data.image_aspect, config.data.system_prompt],
        [options.chair_prompt, options.max_new_tokens, options.batch_size],
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        image_identities(_images(benchmarks), Path(config.data.image_root or ".")),
        list(benchmarks.coco.file_of_image.items()) if benchmarks.coco else None,
        [asdict(question) for question in benchmarks.questions],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_benchmarks(options: EvaluationConfig) -> Benchmarks:
    """Reads the ground truth, limited to the first `limit` images and as many questions of each file.

    Raises:
        ValueError: No benchmark is configured, or a file has the wrong format.
    """
    if not options.chair_instances and not options.pope_questions:
        raise ValueError("nothing to measure: set evaluation.chair_instances or evaluation.pope_questions")
    stop = options.limit or None
    coco = None
    if options.chair_instances:
        coco = read_coco(
            Path(options.chair_instances),
            Path(options.chair_captions) if options.chair_captions else None,
            Path(options.synonyms) if options.synonyms else None,
        )
        kept = dict(list(coco.file_of_image.items())[:stop])
        coco = CocoImages(kept, {image_id: coco.present_of_image[image_id] for image_id in kept}, coco.lexicon)
    elif options.chair_captions:
        raise ValueError("evaluation.chair_captions is set without chair_instances; CHAIR needs instances")
    questions = tuple(q for path in options.pope_questions for q in read_pope(Path(path))[:stop])
    return Benchmarks(coco, questions)


def with_usable_images(benchmarks: Benchmarks, image_root: Path, bad: BadRecords) -> Benchmarks:
    """The benchmarks without unusable images; decodes every image before anything is generated.

    Scores over fewer images are not comparable: unusable ones are logged and listed in the results.

    Raises:
        RecordError: `bad.on_bad` is error, and an image is unusable.
        TooManyBadRecords: More images are unusable than `bad.max_bad_share` allows.
    """
    images = _images(benchmarks)
    unusable = set()
    for image in images:
        try:
            load_image(image_root, image)
        except ImageError as error:
            bad.report(Problem(error.code, str(image_root), image, str(error)))
            unusable.add(image)
    bad.check_share(len(images), "the benchmarks' images")
    if not unusable:
        return benchmarks
    logger.warning("%d of %d images are unusable: scores cover the other images only", len(unusable), len(images))
    coco = benchmarks.coco
    if coco is not None:
        kept = {image_id: file for image_id, file in coco.file_of_image.items() if file not in unusable}
        coco = CocoImages(kept, {image_id: coco.present_of_image[image_id] for image_id in kept}, coco.lexicon)
    return Benchmarks(coco, tuple(question for question in benchmarks.questions if question.image not in unusable))


def _images(benchmarks: Benchmarks) -> list[str]:
    """Every image once, in order."""
    files = [*(benchmarks.coco.file_of_image.values() if benchmarks.coco else ())]
    return list(dict.fromkeys([*files, *(question.image for question in benchmarks.questions)]))


def evaluate_model(
    model: Any, encoder: Encoder, benchmarks: Benchmarks, options: EvaluationConfig, *, progress: bool = True
) -> EvaluationResult:
    """Generates greedy answers in this process and scores them.

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        encoder: Encoder of the same model.
        benchmarks: From `read_benchmarks`.
    """
    journal = AnswerJournal()
    give_answers(model, encoder, benchmarks, options, journal, progress=progress)
    return score(benchmarks, journal, 0.0)


def give_answers(
    model: Any,
    encoder: Encoder,
    benchmarks: Benchmarks,
    options: EvaluationConfig,
    journal: AnswerJournal,
    *,
    progress: bool = True,
) -> None:
    """Generates this rank's share of the missing answers; raises as `answer_requests` does."""
    describe, ask = [], []
    if benchmarks.coco is not None:
        images = benchmarks.coco.file_of_image
        describe = [Request(f"image {i}", file, options.chair_prompt) for i, file in images.items()]
    if benchmarks.questions:
        ask = [Request(f"question {q.split} {q.question_id}", q.image, q.text) for q in benchmarks.questions]
    for name, label, requests in (("chair", "CHAIR: describing", describe), ("pope", "POPE: answering", ask)):
        if requests:
            answer_requests(
                model,
                encoder,
                requests,
                journal,
                name,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                label=label,
                progress=progress,
            )


def score(benchmarks: Benchmarks, journal: AnswerJournal, stall_timeout_s: float) -> EvaluationResult:
    """Scores the answers, waiting for those of other ranks; raises as `AnswerJournal.all` does."""
    chair, pope = None, None
    if benchmarks.coco is not None:
        images = benchmarks.coco.file_of_image
        pairs = list(zip(images, journal.all("chair", len(images), stall_timeout_s), strict=True))
        chair = score_descriptions(pairs, benchmarks.coco.present_of_image, benchmarks.coco.lexicon)
        if not chair.num_mentions:
            logger.warning("no description names any object, so chair_i is 0 without meaning; read the answers")
    if benchmarks.questions:
        answers = journal.all("pope", len(benchmarks.questions), stall_timeout_s)
        pope = score_answers(benchmarks.questions, answers)
    return EvaluationResult(chair, pope)


def result_to_json(result: EvaluationResult, benchmarks: Benchmarks) -> dict[str, Any]:
    """All metrics and answers as plain JSON values."""
    tree: dict[str, Any] = {"metrics": result.metrics(), "chair": None, "pope": None}
    if result.chair is not None and benchmarks.coco is not None:
        files = benchmarks.coco.file_of_image
        tree["chair"] = {
            "chair_i": result.chair.chair_i,
            "chair_s": result.chair.chair_s,
            "recall": result.chair.recall,
            "num_mentions": result.chair.num_mentions,
            "num_hallucinated_mentions": result.chair.num_hallucinated_mentions,
            "descriptions": [_description_to_json(score, files) for score in result.chair.descriptions],
        }
    if result.pope is not None:
        tree["pope"] = {
            "average": asdict(result.pope.average),
            "splits": {split: asdict(metrics) for split, metrics in result.pope.splits.items()},
            "answers": [
                {**asdict(q), "label": _yes_no(q.label), "answer": answer, "read_as": _yes_no(says_yes(answer))}
                for q, answer in zip(result.pope.questions, result.pope.answers, strict=True)
            ],
        }
    return tree


def format_table(result: EvaluationResult) -> str:
    """The metrics as aligned text, in percent."""
    blocks = []
    if result.chair is not None:
        row = ["CHAIR", *_percent((result.chair.chair_i, result.chair.chair_s, result.chair.recall))]
        blocks.append(_align([["", "chair_i", "chair_s", "recall"], row]))
    if result.pope is not None:
        head = ["POPE", "accuracy", "precision", "recall", "f1", "yes_ratio"]
        rows = [[split, *_percent(asdict(m).values())] for split, m in result.pope.splits.items()]
        rows.append(["average", *_percent(asdict(result.pope.average).values())])
        blocks.append(_align([head, *rows]))
    return "\n\n".join(blocks)


def _description_to_json(score: DescriptionScore, file_of_image: dict[int | str, str]) -> dict[str, Any]:
    return {
        "image_id": score.image_id,
        "image": file_of_image[score.image_id],
        "text": score.text,
        "present": sorted(score.present),
        "mentions": [asdict(mention) for mention in score.mentions],
        "hallucinated": [mention.object for mention in score.hallucinated],
        "missing": list(score.missing),
    }


def _percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * value:.1f}" for value in values]


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
