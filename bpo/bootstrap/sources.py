"""Sources of negatives: each turns a batch of annotations into outcomes. A new source implements `NegativeSource`.

An outcome depends only on the job's seed, the record and the source's options.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bpo.bootstrap.clean import clean_rewriting
from bpo.bootstrap.completion_types import PROVENANCE_SOURCES, candidate_key
from bpo.bootstrap.engines.text import TextGenerator
from bpo.bootstrap.engines.vision import Sampling, VisionGenerator, VisionRequest, special_tokens_of
from bpo.bootstrap.inject import InjectionRequest, Mode, build_request, choose_mode, question_of
from bpo.bootstrap.job.outcomes import Outcome, Status
from bpo.bootstrap.segments import cut_segment
from bpo.bootstrap.validate import Refusal, refusal
from bpo.bootstrap.weaken import choose_weakening
from bpo.config.bootstrap import CANDIDATE_SOURCES, BootstrapConfig, RegenerateConfig, Source
from bpo.config.training import Config
from bpo.data.encode import Encoder
from bpo.formats.images import ImageError, load_image
from bpo.job.chat_server import Reply
from bpo.job.seeds import derive_seed
from bpo.records import Annotation, Provenance

_BROKEN = "\ufffd"  # decoded from a part of a character


class NegativeSource(Protocol):
    """One source of negatives.

    Attributes:
        whole_batches: Whether a partly finished batch is regenerated whole: the answers of one batch depend on each
            other through rounding.
    """

    whole_batches: bool

    def prepare(self, annotation: Annotation) -> Any:
        """Work without the model, such as reading images. Thread-safe; must not raise."""

    def outcomes(self, batch: Sequence[Annotation], prepared: Sequence[Any]) -> Iterable[Outcome]:
        """One outcome per annotation, in order of completion; outcomes yielded before an error remain valid.

        Args:
            prepared: The result of `prepare` for each annotation.
        """


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """The multimodal model's request for one record with its prepared input, or the error that prevented it."""

    request: VisionRequest
    prepared: Any = None
    error: str | None = None


class ImageAnswers:
    """The model's answers to images weakened per source (`choose_weakening`), or its versions of parts of annotations.

    A source of a plug-in may be a subclass with requests of its own: by default, they ask about the clean images.
    """

    def __init__(self, source: Source, config: Config, generator: VisionGenerator, candidate: int = 0):
        self.source, self.config, self.generator, self.candidate = source, config, generator, candidate
        self.key = candidate_key(source, candidate)
        self.whole_batches = generator.whole_batches

    def prepare(self, annotation: Annotation) -> PreparedRequest:
        request = self.request(annotation)
        try:
            return PreparedRequest(request, self.generator.prepare(request))
        except ImageError as error:
            return PreparedRequest(request, error=str(error))

    def outcomes(self, batch: Sequence[Annotation], prepared: Sequence[PreparedRequest]) -> Iterator[Outcome]:
        asked: list[int] = []
        for index, (annotation, ready) in enumerate(zip(batch, prepared, strict=True)):
            if ready.error is None:
                asked.append(index)
            else:
                yield Outcome(annotation.id, self.key, "broken", reason=ready.error)
        requests = [prepared[index].request for index in asked]
        for position, reply in self.generator.replies(requests, [prepared[index].prepared for index in asked]):
            yield self.judge(batch[asked[position]], requests[position], reply)

    def request(self, annotation: Annotation) -> VisionRequest:
        """The model's request for one record; depends only on seed, record and options."""
        options = self.config.bootstrap
        seed = derive_seed(options.seed, annotation.id, self.key)
        is_weakened = self.source == "regenerate" and options.regenerate.weakened
        weakening = choose_weakening("weaken" if is_weakened else self.source, options.weaken, seed)
        sampling = sampling_of(self.source, options)
        request = VisionRequest(annotation.id, annotation.images, annotation.prompt, weakening, sampling=sampling)
        if self.source == "regenerate":
            beginning = cut_annotation(annotation.response, options.regenerate, derive_seed(seed, "cut"))
            return replace(request, beginning=beginning)
        return self._segment(request, annotation.response) if self.source == "segment" else request

    def _segment(self, request: VisionRequest, response: str) -> VisionRequest:
        """The request for a segment of the annotation."""
        encoder = self.generator.encoder
        assert encoder is not None and request.sampling is not None, "required_paths() requires model.path in this case"
        ids = encoder.encode_completion(response)[:-1]
        segment = cut_segment(ids, request.weakening.seed, self.config.bootstrap.segment)
        beginning, ending = segment.texts(ids, lambda some: encoder.tokenizer.decode(list(some)))
        sampling = replace(request.sampling, max_new_tokens=segment.length)
        return replace(request, beginning=beginning, ending=ending, segment=segment, sampling=sampling)

    def judge(self, annotation: Annotation, request: VisionRequest, reply: Reply) -> Outcome:
        """The outcome of a reply."""
        if reply.error:
            status: Status = "broken" if reply.is_broken else "failed"
            return Outcome(annotation.id, self.key, status, reason=reply.error)
        sampling = request.sampling or sampling_of(self.source, self.config.bootstrap)
        provenance = Provenance(
            source=PROVENANCE_SOURCES[self.source],
            model=self.generator.name,
            policy=self.generator.policy,
            noise_step=request.weakening.noise_step,
            seed=request.weakening.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or None,
            max_new_tokens=sampling.max_new_tokens,
            space=request.weakening.space,
            kept_words=len(request.beginning.split()) if request.beginning else None,
            candidate=self.candidate or None,
        )
        is_candidate = self.source in CANDIDATE_SOURCES
        refused = refusal(
            reply.text,
            annotation.response,
            max_words=self.config.data.max_completion_words,
            special_tokens=self.generator.special_tokens,
            # A candidate may become the preferred answer, whose end is learned.
            finished=reply.finished or not is_candidate,
            options=self.config.bootstrap.validate,
            question=question_of(annotation),
            compared=not is_candidate,
        )
        if refused is None and request.segment and _BROKEN in reply.text and _BROKEN not in annotation.response:
            refused = Refusal("characters", "the segment begins or ends within a character")
        return judged(annotation.id, self.key, reply.text, refused, provenance)


def sampling_of(source: str, options: BootstrapConfig) -> Sampling:
    """The sampling options of a source that the multimodal model answers."""
    own, segment = options.sample, options.segment
    if source == "sample":
        return Sampling(own.temperature, own.top_p, own.max_new_tokens)
    if source == "greedy":
        return Sampling(0.0, 1.0, own.max_new_tokens)
    if source == "segment":
        return Sampling(segment.temperature, segment.top_p, segment.max_tokens, segment.top_k)
    return Sampling(options.weaken.temperature, options.weaken.top_p, options.weaken.max_new_tokens)


def cut_annotation(response: str, options: RegenerateConfig, seed: int) -> str:
    """The first words of an annotation, without trailing space: a fraction between `cut_min` and `cut_max`.

    With two or more words, at least one is kept and at least one is left to generate.
    """
    ends = [match.end() for match in re.finditer(r"\S+", response.strip())]
    share = options.cut_min + (options.cut_max - options.cut_min) * (seed % 10_000) / 10_000
    kept = min(max(1, round(share * len(ends))), len(ends) - 1)
    return response.strip()[: ends[kept - 1]] if kept > 0 else ""


class InjectedErrors:
    """Annotations rewritten by a text-only LLM with plausible errors (`inject`)."""

    source = "inject"

    def __init__(
        self,
        config: Config,
        generator: TextGenerator,
        encoder: Encoder | None,
        checks_images: bool,
        candidate: int = 0,
    ):
        self.config, self.generator, self.encoder, self.checks_images = config, generator, encoder, checks_images
        self.candidate, self.key = candidate, candidate_key(self.source, candidate)
        self.whole_batches = generator.whole_batches
        # Training feeds the completion to the multimodal model, so its control tokens are checked too.
        self._special_tokens = (*generator.special_tokens, *(special_tokens_of(encoder) if encoder else ()))

    def prepare(self, annotation: Annotation) -> str | None:
        """Why training could not read the record's images; checked only if no other source of this job reads them."""
        root = Path(self.config.data.image_root or ".")
        for image in annotation.images if self.checks_images else ():
            try:
                load_image(root, image)
            except ImageError as error:
                return str(error)
        return None

    def outcomes(self, batch: Sequence[Annotation], prepared: Sequence[str | None]) -> Iterator[Outcome]:
        pending: list[Annotation] = []
        for annotation, error in zip(batch, prepared, strict=True):
            if error:
                yield Outcome(annotation.id, self.key, "broken", reason=error)
            else:
                pending.append(annotation)
        options = self.config.bootstrap.inject
        last = options.attempts - 1 if options.temperature else 0
        for attempt in range(last + 1):
            modes = [choose_mode(self.config.bootstrap.inject.mode, annotation) for annotation in pending]
            requests = [self._request(a, mode, attempt) for a, mode in zip(pending, modes, strict=True)]
            again: list[int] = []
            for index, reply in self.generator.replies(requests) if requests else ():
                outcome = self._judge(pending[index], modes[index], requests[index], reply)
                if outcome.status == "refused" and attempt < last:
                    again.append(index)
                else:
                    yield outcome
            pending = [pending[index] for index in sorted(again)]

    def _request(self, annotation: Annotation, mode: Mode, attempt: int) -> InjectionRequest:
        seed = derive_seed(self.config.bootstrap.seed, annotation.id, self.key, attempt)
        options = self.config.bootstrap.inject
        return build_request(annotation, mode, options.max_new_tokens, seed, options.prompt_dir)

    def _judge(self, annotation: Annotation, mode: Mode, request: InjectionRequest, reply: Reply) -> Outcome:
        if reply.error:
            return Outcome(annotation.id, self.key, "failed", reason=reply.error)
        text, has_next_turn = clean_rewriting(reply.text, annotation.response)
        refused = refusal(
            text,
            annotation.response,
            max_words=self.config.data.max_completion_words,
            special_tokens=self._special_tokens,
            finished=reply.finished or has_next_turn,
            options=self.config.bootstrap.validate,
            question=question_of(annotation),
            rewriting=mode,
        )
        options = self.config.bootstrap.inject
        provenance = Provenance(
            source=PROVENANCE_SOURCES[self.source],
            model=self.generator.name,
            policy=self.generator.policy,
            mode=mode,
            seed=request.seed,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=request.max_new_tokens,
            candidate=self.candidate or None,
        )
        return judged(annotation.id, self.key, text, refused, provenance)


def judged(record_id: str, source: str, text: str, refused: Refusal | None, provenance: Provenance) -> Outcome:
    """The outcome of a generated completion: kept or refused."""
    if refused is None:
        return Outcome(record_id, source, "kept", text, provenance=provenance)
    return Outcome(record_id, source, "refused", text, refused.reason, provenance, refused.detail)
