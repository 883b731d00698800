"""The sources of negatives: each turns a batch of annotations into outcomes. To add one, write a class like these.

An outcome depends on the job's seed, the record and the source's options alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bpo.bootstrap.clean import clean_rewriting
from bpo.bootstrap.generators import Reply, TextGenerator
from bpo.bootstrap.inject import InjectionRequest, Mode, build_request, choose_mode
from bpo.bootstrap.merge import PROVENANCE_SOURCES
from bpo.bootstrap.parts import Outcome
from bpo.bootstrap.seeds import derive_seed
from bpo.bootstrap.validate import Refusal, refusal
from bpo.bootstrap.weaken import NO_NOISE, answer_weakened
from bpo.config import Config
from bpo.data.encode import EncodedPrompt, Encoder, EncodingError
from bpo.data.images import ImageError, load_image
from bpo.records import Annotation, Provenance


class NegativeSource(Protocol):
    def outcomes(self, batch: Sequence[Annotation]) -> list[Outcome]:
        """One outcome an annotation, in order."""


class ImageAnswers:
    """The model's answers to the weakened image (`weaken`), or to the clean one (`unweakened`)."""

    def __init__(self, source: str, config: Config, encoder: Encoder, model: Any):
        self.source, self.config, self.encoder, self.model = source, config, encoder, model
        self.noise_step = config.bootstrap.weaken.noise_step if source == "weaken" else NO_NOISE
        self._special_tokens = special_tokens_of(encoder)

    def outcomes(self, batch: Sequence[Annotation]) -> list[Outcome]:
        prompts: dict[str, EncodedPrompt] = {}
        made: dict[str, Outcome] = {}
        for annotation in batch:
            try:
                prompts[annotation.id] = self._encode(annotation)
            except (ImageError, EncodingError) as error:
                made[annotation.id] = Outcome(annotation.id, self.source, "broken", reason=str(error))
        seeds = [derive_seed(self.config.bootstrap.seed, record_id, self.source) for record_id in prompts]
        answers = answer_weakened(
            self.model,
            self.encoder,
            list(prompts.values()),
            self.config.bootstrap.weaken,
            self.noise_step,
            seeds,
        )
        annotated = {annotation.id: annotation.response for annotation in batch}
        for record_id, answer, seed in zip(prompts, answers, seeds, strict=True):
            made[record_id] = self._judge(record_id, answer, annotated[record_id], seed)
        return [made[annotation.id] for annotation in batch]

    def _encode(self, annotation: Annotation) -> EncodedPrompt:
        prompt = self.encoder.encode_prompt(annotation.id, annotation.images, annotation.prompt)
        if len(prompt.prefix_ids) >= self.encoder.max_length_tokens:
            raise EncodingError(
                f"record {annotation.id!r}: the prompt takes {len(prompt.prefix_ids)} tokens and leaves no room in "
                f"data.max_length_tokens={self.encoder.max_length_tokens}"
            )
        return prompt

    def _judge(self, record_id: str, answer: str, annotation: str, seed: int) -> Outcome:
        options = self.config.bootstrap.weaken
        provenance = Provenance(
            source=PROVENANCE_SOURCES[self.source],
            model=self.config.model.path,
            noise_step=None if self.noise_step == NO_NOISE else self.noise_step,
            seed=seed,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
        )
        max_words = self.config.data.max_completion_words
        refused = refusal(
            answer,
            annotation,
            max_words=max_words,
            special_tokens=self._special_tokens,
            options=self.config.bootstrap.validate,
        )
        return judged(record_id, self.source, answer, refused, provenance)


class InjectedErrors:
    """Annotations that a text-only LLM rewrote with plausible errors (`inject`)."""

    source = "inject"

    def __init__(self, config: Config, generator: TextGenerator, encoder: Encoder | None, checks_images: bool):
        self.config, self.generator, self.encoder, self.checks_images = config, generator, encoder, checks_images
        # The completion goes to the multimodal model in training, so its control tokens count as well.
        self._special_tokens = (*generator.special_tokens, *(special_tokens_of(encoder) if encoder else ()))

    def outcomes(self, batch: Sequence[Annotation]) -> list[Outcome]:
        made: dict[str, Outcome] = {}
        for annotation in batch if self.checks_images else ():
            error = self._image_error(annotation)
            if error:
                made[annotation.id] = Outcome(annotation.id, self.source, "broken", reason=error)
        pending = [annotation for annotation in batch if annotation.id not in made]
        for attempt in range(self.config.bootstrap.inject.attempts):
            modes = [choose_mode(self.config.bootstrap.inject.mode, annotation) for annotation in pending]
            requests = [self._request(a, mode, attempt) for a, mode in zip(pending, modes, strict=True)]
            replies = self.generator.reply(requests) if requests else []
            for annotation, mode, request, reply in zip(pending, modes, requests, replies, strict=True):
                made[annotation.id] = self._judge(annotation, mode, request, reply)
            pending = [annotation for annotation in pending if made[annotation.id].status == "refused"]
        return [made[annotation.id] for annotation in batch]

    def _request(self, annotation: Annotation, mode: Mode, attempt: int) -> InjectionRequest:
        seed = derive_seed(self.config.bootstrap.seed, annotation.id, self.source, attempt)
        options = self.config.bootstrap.inject
        return build_request(annotation, mode, options.max_new_tokens, seed, options.prompt_dir)

    def _image_error(self, annotation: Annotation) -> str | None:
        """Why training could not read the record's images; no other source looks at them in this job."""
        root = Path(self.config.data.image_root or ".")
        for image in annotation.images:
            try:
                load_image(root, image)
            except ImageError as error:
                return str(error)
        return None

    def _judge(self, annotation: Annotation, mode: Mode, request: InjectionRequest, reply: Reply) -> Outcome:
        if reply.error:
            return Outcome(annotation.id, self.source, "failed", reason=reply.error)
        text, went_on = clean_rewriting(reply.text, annotation.response)
        refused = refusal(
            text,
            annotation.response,
            max_words=self.config.data.max_completion_words,
            special_tokens=self._special_tokens,
            finished=reply.finished or went_on,
            options=self.config.bootstrap.validate,
            # An answer to a question about another image need not keep a word of the annotation.
            is_rewriting=mode == "description",
        )
        options = self.config.bootstrap.inject
        provenance = Provenance(
            source=PROVENANCE_SOURCES[self.source],
            model=self.generator.name,
            mode=mode,
            seed=request.seed,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=request.max_new_tokens,
        )
        return judged(annotation.id, self.source, text, refused, provenance)


def judged(record_id: str, source: str, text: str, refused: Refusal | None, provenance: Provenance) -> Outcome:
    """The outcome of a completion that was made, kept or refused."""
    if refused is None:
        return Outcome(record_id, source, "kept", text, provenance=provenance)
    return Outcome(record_id, source, "refused", text, refused.reason, provenance, refused.detail)


def special_tokens_of(encoder: Encoder) -> tuple[str, ...]:
    """Control tokens of the model as text, its image placeholder among them."""
    placeholder = encoder.tokenizer.convert_ids_to_tokens(encoder.image_token_id)
    return (*encoder.tokenizer.all_special_tokens, placeholder)
