"""Answers of a model to the questions of a suite, in batches; equal questions of several benchmarks are asked once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.benchmark import Benchmark
from bpo.job.seeds import derive_seed
from bpo.records import ContentPart, Turn

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder
    from bpo.model.decoding.cost import DecodingCost

# After the key of a request, the key of the probabilities of its labels under the biased views.
_PRIOR = " prior"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All that an answer depends on, apart from the model and the options of decoding.

    Attributes:
        image: Path relative to data.image_root; empty asks without an image.
        text: The complete prompt.
        max_new_tokens: Maximum length of the answer.
        labels: See `Question.labels`.
        scope: The benchmark, where decoding depends on its other questions; the setting of a grid; else empty.
    """

    image: str
    text: str
    max_new_tokens: int
    labels: tuple[str, ...] = ()
    scope: str = ""

    @property
    def key(self) -> str:
        """32 hexadecimal digits, under which the journal has the answer."""
        return hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()[:32]

    @property
    def prompt(self) -> tuple[Turn, ...]:
        image = (ContentPart("image"),) if self.image else ()
        return (Turn("user", (*image, ContentPart("text", self.text))),)


def requests_of(benchmark: Benchmark, options: EvaluationConfig) -> list[Request]:
    """One request per question of the benchmark, in order; equal questions have equal requests."""
    depends = options.decoding == "calibration" and options.calibration.over == "dataset"
    return [
        Request(
            image=question.image,
            text=question.text,
            max_new_tokens=benchmark.answer_length,
            labels=question.labels,
            scope=benchmark.name if depends else "",
        )
        for question in benchmark.questions
    ]


def batches_of(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """Every distinct request once, in order, in batches of one scope and maximum length.

    Batches depend on neither the ranks nor finished answers, so that answers do not either.
    """
    batches = []
    for _, run in groupby(dict.fromkeys(requests), lambda request: (request.scope, request.max_new_tokens)):
        alike = list(run)
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return batches


def answer_requests(
    model: Any,
    encoder: Encoder,
    requests: Iterable[Request],
    journal: AnswerJournal,
    options: EvaluationConfig,
    *,
    progress: bool = True,
    cost: DecodingCost | None = None,
) -> None:
    """Generates this rank's missing answers into `journal`, batch by batch.

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        encoder: Encoder of the same model.
        options: Batch size and decoding.
        cost: Adds this process's forward passes.

    Raises:
        ImageError: An image cannot be read; names it.
        Interrupted: A signal was received; finished batches are kept.
    """
    from bpo.model.decoding.answer import answer_prompts

    requests = list(requests)
    priors: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    if options.decoding == "calibration" and options.calibration.over == "dataset":
        priors = _mean_priors(model, encoder, requests, journal, options, progress=progress, cost=cost)

    def answers(batch: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> list[str]:
        return answer_prompts(
            model,
            encoder,
            prompts,
            labels=[request.labels for request in batch],
            options=options,
            max_new_tokens=batch[0].max_new_tokens,
            seeds=_seeds(batch, options),
            cost=cost,
            priors={labels: prior for (scope, labels), prior in priors.items() if scope == batch[0].scope},
        )

    _fill(journal, encoder, requests, options, answers, progress=progress)


def _mean_priors(
    model: Any,
    encoder: Encoder,
    requests: Iterable[Request],
    journal: AnswerJournal,
    options: EvaluationConfig,
    *,
    progress: bool,
    cost: DecodingCost | None,
) -> dict[tuple[str, tuple[str, ...]], list[float]]:
    """(scope, labels) -> their mean probabilities under the biased views, over all questions of the benchmark.

    Those of each question are journal entries: ranks share them and average the same numbers in the same order.
    """
    from bpo.model.decoding.calibration import biased_probabilities
    from bpo.model.decoding.cost import DecodingCost

    asked = list(dict.fromkeys(request for request in requests if request.labels and request.image))

    def measured(batch: Sequence[Request], prompts: Sequence[EncodedPrompt]) -> list[str]:
        labels, seeds = [request.labels for request in batch], _seeds(batch, options)
        counted = DecodingCost() if cost is None else cost
        found = biased_probabilities(model, encoder, prompts, labels, options.contrast, seeds, counted)
        return [json.dumps(p) for p in found]

    _fill(journal, encoder, asked, options, measured, _PRIOR, progress=progress)
    texts = journal.all([request.key + _PRIOR for request in asked], options.stall_timeout_s)
    grouped: dict[tuple[str, tuple[str, ...]], list[list[float]]] = {}
    for request, text in zip(asked, texts, strict=True):
        grouped.setdefault((request.scope, request.labels), []).append(json.loads(text))
    return {key: [sum(of_label) / len(rows) for of_label in zip(*rows, strict=True)] for key, rows in grouped.items()}


def _seeds(batch: Sequence[Request], options: EvaluationConfig) -> list[int]:
    return [derive_seed(options.sampling.seed, request.key) for request in batch]


def _fill(
    journal: AnswerJournal,
    encoder: Encoder,
    requests: Iterable[Request],
    options: EvaluationConfig,
    answers: Callable[[Sequence[Request], Sequence[EncodedPrompt]], list[str]],
    kind: str = "",
    *,
    progress: bool,
) -> None:
    """Puts this rank's missing `answers` to batches into `journal`, under the request's key followed by `kind`."""
    ranks = journal.ranks
    batches = [
        batch
        for batch in batches_of(requests, options.batch_size)[ranks.rank :: ranks.world_size]
        if any(request.key + kind not in journal for request in batch)
    ]
    total = sum(map(len, batches))
    label = "measuring the prior" if kind else "answering"
    with tqdm(total=total, desc=label, unit="answer", disable=not (progress and ranks.is_main)) as bar:
        for batch, prompts in zip(batches, _encoded_batches(encoder, batches), strict=True):
            journal.check_stop()
            texts = answers(batch, prompts)
            journal.put({request.key + kind: text for request, text in zip(batch, texts, strict=True)})
            bar.update(len(batch))


def _encoded_batches(encoder: Encoder, batches: Sequence[Sequence[Request]]) -> Iterator[list[EncodedPrompt]]:
    """Yields encoded batches; encodes the next one in a thread while the model answers the current one."""

    def encode(batch: Sequence[Request]) -> list[EncodedPrompt]:
        return [encoder.encode_prompt(r.image or r.text[:40], (r.image,) if r.image else (), r.prompt) for r in batch]

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(encode, batches[0]) if batches else None
        for following in (*batches[1:], None):
            if ahead is None:
                return
            current, ahead = ahead, None if following is None else pool.submit(encode, following)
            yield current.result()
