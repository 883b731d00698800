"""Bootstrapping options."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Literal

from bpo.config.negatives import WHOLE_SET_SOURCES, EditConfig, SwapConfig
from bpo.config.options import NUM_SEEDS, Range, Section, check, number, seconds
from bpo.config.select import SelectConfig
from bpo.config.server import ServerConfig

# Names of the built-in sources; a plug-in (`bootstrap.plugin`) adds others.
SOURCES = (
    "weaken", "inject", "crop", "mask", "regenerate", "text-only", "unweakened", "swap", "edit",
    "sample", "greedy", "segment",
)  # fmt: skip
# Answers that are not negatives before a judge has scored them: all that are usable stay in the group.
CANDIDATE_SOURCES = ("sample", "greedy")
Source = str
CacheKind = Literal["reserved", "dynamic", "static"]


@dataclass(kw_only=True)
class WeakenConfig(Section):
    """Negatives from the model's answers to weakened images (types `mllm-hal`, `mllm-crop`, `mllm-mask`, ...).

    The sampling options apply to all sources answered by the multimodal model.

    Attributes:
        noise_step: Step t of the forward diffusion x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, 0..999; -1: no noise.
        noise_steps: List of diffusion steps, one of which is drawn per record; empty uses `noise_step` for all records.
        space: Where noise is added: `normalised`, to the model's input pixels (as in the paper), or `pixel`, to the
            image before the image processor (clipped to 0..255), as required for servers and vLLM.
        pixel_side: Longer side in pixels to which images are downscaled before noise is added in pixel space, because
            downscaling afterwards would average out the noise; 0 keeps the size.
        crop_share: Fraction of the image area shown by the source `crop`, at a random position.
        mask_share: Fraction of the cells of a 14 x 14 grid that the source `mask` covers with grey.
        temperature: Sampling temperature; 0 means greedy decoding.
        top_p: Cumulative probability of nucleus sampling.
        max_new_tokens: Maximum number of tokens per answer.
    """

    where = "bootstrap.weaken"

    noise_step: int = number(900, at_least=-1, at_most=999)
    noise_steps: list[int] = field(default_factory=list, metadata={"range": Range(at_least=-1, at_most=999)})
    space: Literal["normalised", "pixel"] = "normalised"
    pixel_side: int = number(336, at_least=1, at_most=2**15, zero="keep the size")
    crop_share: float = number(0.15, above=0, below=1)
    mask_share: float = number(0.8, above=0, below=1)
    temperature: float = number(0.2, at_least=0, zero="greedy")
    top_p: float = number(1.0, above=0, at_most=1)
    max_new_tokens: int = number(1024, at_least=1)


@dataclass(kw_only=True)
class RegenerateConfig(Section):
    """Negatives that keep the start of the annotation and are continued by the model (type `mllm-cont`).

    Attributes:
        cut_min: Smallest fraction of the annotation's words to keep; the fraction is drawn per record.
        cut_max: Largest fraction of the annotation's words to keep.
        weakened: Whether to show the model the weakened image instead of the clean one.
    """

    where = "bootstrap.regenerate"

    cut_min: float = number(0.2, above=0, below=1)
    cut_max: float = number(0.7, above=0, below=1)
    weakened: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.cut_min <= self.cut_max, "bootstrap.regenerate requires cut_min <= cut_max")


@dataclass(kw_only=True)
class SampleConfig(Section):
    """Candidates for a judge: answers to the clean image (types `mllm-sample` and `mllm-greedy`).

    Attributes:
        count: Number of answers that `sample` draws per record, each with its own seed. Raising it later keeps those
            that exist.
        temperature: Sampling temperature of `sample`; `greedy` has 0.
        top_p: Cumulative probability of nucleus sampling.
        max_new_tokens: Maximum number of tokens per answer, also of `greedy`.
    """

    where = "bootstrap.sample"

    count: int = number(4, at_least=1, at_most=64)
    temperature: float = number(0.7, above=0)
    top_p: float = number(1.0, above=0, at_most=1)
    max_new_tokens: int = number(1024, at_least=1)


@dataclass(kw_only=True)
class SegmentConfig(Section):
    """Negatives with a segment of the annotation generated again, its start and end kept (SAPO; type `mllm-segment`).

    The segment has S = min(max_tokens, length) tokens and starts at t ~ U{0 .. length - 3 - S}, or at 0 if the
    annotation is not longer than S + 3. If the model ends its answer within the segment, the end of the annotation is
    dropped.

    Attributes:
        max_tokens: Largest length of the segment.
        temperature: Sampling temperature; 0 means greedy decoding.
        top_k: Number of most likely tokens to sample from; 0 means all.
        top_p: Cumulative probability of nucleus sampling.
    """

    where = "bootstrap.segment"

    max_tokens: int = number(256, at_least=1)
    temperature: float = number(0.7, at_least=0, zero="greedy")
    top_k: int = number(50, at_least=0, zero="all")
    top_p: float = number(0.95, above=0, at_most=1)


@dataclass(kw_only=True)
class VisionConfig(Section):
    """Inference engine of the multimodal model. Weights are loaded from `model.path`, or by the server.

    Attributes:
        engine: `transformers` or `vllm` (requires the extra `vllm`) run in this process; `server` sends requests.
        server: Server options, used if `engine` is `server`.
    """

    where = "bootstrap.vision"

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            (self.engine == "server") == bool(self.server.url),
            "bootstrap.vision: engine `server` and server.url require each other; set both or neither",
        )


@dataclass(kw_only=True)
class InjectConfig(Section):
    """Negatives from a text-only LLM that rewrites the annotation with plausible errors (type `llm-hal`).

    Attributes:
        mode: `description` rewrites a description; `qa` answers for a similar but different image; `auto` uses
            `description` for prompts that ask for one and `qa` otherwise.
        prompt_dir: Folder with custom description.yaml and qa.yaml; empty uses bpo/bootstrap/prompts. Small LLMs need
            few-shot examples in the style of the annotations.
        llm: Directory of a transformers causal LM; empty uses the language model of the multimodal model.
        gguf_file: Name of a GGUF weights file in the directory `llm`, if any.
        engine: Inference engine of `llm`: `transformers`, or `vllm` (requires the extra `vllm`).
        server: OpenAI-compatible server to use instead of `llm`.
        temperature: Sampling temperature; 0 means greedy decoding.
        top_p: Cumulative probability of nucleus sampling.
        max_new_tokens: Maximum number of tokens per rewritten answer.
        attempts: Maximum number of attempts per record if its rewriting is rejected, each with a different seed; one if
            temperature is 0.
        dtype: Data type of the text-only LLM.
    """

    where = "bootstrap.inject"

    mode: Literal["description", "qa", "auto"] = "auto"
    prompt_dir: str = ""
    llm: str = ""
    gguf_file: str = ""
    engine: Literal["transformers", "vllm"] = "transformers"
    server: ServerConfig = field(default_factory=ServerConfig)
    temperature: float = number(0.8, at_least=0, zero="greedy")
    top_p: float = number(0.95, above=0, at_most=1)
    max_new_tokens: int = number(1024, at_least=1)
    attempts: int = number(3, at_least=1)
    dtype: Literal["float32", "bfloat16", "float16", "config"] = "config"

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.llm and self.server.url
        check(not both, "bootstrap.inject.llm and bootstrap.inject.server.url are both set; choose one")
        check(
            self.engine == "transformers" or bool(self.llm),
            "bootstrap.inject.engine is vllm but llm is empty; set llm to the text-only LLM to load",
        )


@dataclass(kw_only=True)
class ValidateConfig(Section):
    """Validation of negatives. Empty, truncated and unchanged texts are always rejected.

    Attributes:
        max_repeats: Maximum number of consecutive repeats of a phrase of up to 8 words.
        min_distinct_share: Minimum fraction of distinct words in texts of 12 or more words; 0 disables the check.
        min_changed_words: Minimum number of words that differ from the annotation.
        max_changed_share: Maximum fraction of words that may differ in an injected error; an answer to a question may
            differ in up to 8 words in any case. 1 means no limit.
        min_length_ratio: Minimum ratio of the word counts of negative and annotation, after adding 8 to each.
        max_length_ratio: Maximum ratio of the word counts of negative and annotation, after adding 8 to each.
        require_real_change: Reject changes of style only: no object, attribute, count, relation or unknown word; and
            injected errors that only leave something out.
        same_form: Reject refusals to answer ("I'm sorry, but I can't ..."), answers by yes or no that do not fit the
            question, unless the annotation has that form, and the annotation in the words of the question.
        same_language: Reject a script, or a language identified by function words, that differs from the annotation's.
        refuse_duplicates: Keep only the first of a group's negatives with the same words.
        lexicon: Custom file of objects, attributes, ... in the format of bpo/bootstrap/lexicon/en.yaml, used instead.
    """

    where = "bootstrap.validate"

    max_repeats: int = number(3, at_least=1)
    min_distinct_share: float = number(0.25, at_least=0, below=1)
    min_changed_words: int = number(1, at_least=0)
    max_changed_share: float = number(0.6, above=0, at_most=1)
    min_length_ratio: float = number(0.1, at_least=0, at_most=1)
    max_length_ratio: float = number(10.0, at_least=1)
    require_real_change: bool = True
    same_form: bool = True
    same_language: bool = True
    refuse_duplicates: bool = True
    lexicon: str = ""


@dataclass(kw_only=True)
class BootstrapConfig(Section):
    """Generation of negatives from annotations.

    Attributes:
        sources: Sources of negatives. From the paper: `weaken` (answers to noised images) and `inject` (annotations
            with injected errors). Additional: `swap` (annotations of other images), `edit` (one word exchanged), `crop`
            and `mask` (answers to a part of the image), `regenerate` (continuations of the annotation's start),
            `text-only` (answers without an image), `unweakened` (answers to the clean image, as a control); candidates
            for a judge: `sample` and `greedy` (answers to the clean image), `segment`; or a plug-in's. The paper's
            are `weaken` and `inject`; the default has `swap`, the best single source in benchmarks/grounding, for the
            latter, which did not beat fine-tuning there.
        weaken: Image weakening, and sampling options of the multimodal model.
        inject: Error injection.
        regenerate: Truncation of annotations before their continuation.
        sample: Candidates for a judge.
        segment: Segments of annotations generated again.
        plugin: Python file that registers sources.
        swap: Exchange of annotations between records.
        edit: Exchange of words between annotations.
        select: Number of candidates, and the choice among them.
        vision: Inference engine of the multimodal model.
        validate: Validation of negatives.
        target_shares: Mapping of sources to their target fraction of negatives; surplus negatives are dropped at
            random. Empty keeps all.
        batch_size: Number of answers generated per batch.
        cache: Key-value cache of transformers: `reserved` appends in place; `dynamic` copies the cache for every token;
            `static` has a fixed size, so that transformers can compile decoding on CUDA (without shared prefixes).
        seed: Random seed of noise and sampling, combined with the record's id.
        limit: Use only the first `limit` annotations; 0 uses all.
        max_inject_records: Inject errors only into the first `max_inject_records` annotations; 0 uses all.
        accept_changes: Sources to generate again although an earlier start used other options for them; its outcomes
            are kept, and used again when the options are restored.
        num_shards: Number of jobs that share the annotations, such as array tasks; if above 1, finish with `bpo merge`.
        shard_index: Index of this job, starting from 0.
        claim_timeout_s: Seconds without a heartbeat after which the work of a rank is reassigned.
        num_workers: Number of threads that read and weaken images of the next batch; 0 disables prefetching. Default: 1
            with a model in this process, which more threads would slow down, and 8 with a server or vLLM.
        max_idle_restarts: Maximum SLURM restarts without a finished batch before the job fails; 0 means no limit.
        stall_timeout_s: Seconds without a batch finished by any rank after which rank 0 stops waiting for claimed work.
    """

    where = "bootstrap"

    sources: list[Source] = field(default_factory=lambda: ["weaken", "swap"])
    weaken: WeakenConfig = field(default_factory=WeakenConfig)
    inject: InjectConfig = field(default_factory=InjectConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    plugin: str = ""
    swap: SwapConfig = field(default_factory=SwapConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    target_shares: dict[str, float] = field(default_factory=dict, metadata={"range": Range(above=0)})
    batch_size: int = number(16, at_least=1)
    cache: CacheKind = "reserved"
    seed: int = number(0, at_least=0, below=NUM_SEEDS)
    limit: int = number(0, at_least=0, zero="all")
    max_inject_records: int = number(0, at_least=0, zero="all")
    accept_changes: list[Source] = field(default_factory=list)
    num_shards: int = number(1, at_least=1)
    shard_index: int = number(0, at_least=0)
    claim_timeout_s: float = seconds(120.0, at_least=1)
    num_workers: int | None = number(None, at_least=0, at_most=1024)
    max_idle_restarts: int = number(3, at_least=0, zero="no limit")
    stall_timeout_s: float = seconds(3600.0, at_least=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for source in self.sources if not self.plugin else ():
            close = difflib.get_close_matches(source, SOURCES, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            check(source in SOURCES, f"bootstrap.sources: {source!r} is none of {', '.join(SOURCES)}{hint}")
        for source in self.target_shares:
            check(source in self.sources, f"bootstrap.target_shares.{source} is not in bootstrap.sources")
        check(
            self.shard_index < self.num_shards,
            f"bootstrap.shard_index is {self.shard_index}; it must be below num_shards {self.num_shards}",
        )
        if "weaken" in self.sources and self.vision.engine != "transformers":
            check(
                self.weaken.space == "pixel",
                f"bootstrap.vision.engine {self.vision.engine} takes images, not normalised pixels; set "
                "bootstrap.weaken.space to pixel",
            )
        if "edit" in self.queued_sources:
            check(
                self.vision.engine == "transformers",
                "bootstrap.edit.by is blind, which needs bootstrap.vision.engine transformers, not "
                f"{self.vision.engine}; set that, or edit.by to lexicon",
            )
        check(
            len(self.sources) == len(set(self.sources)) and bool(self.sources),
            "bootstrap.sources must not be empty or contain duplicates",
        )

    @property
    def generated_sources(self) -> list[Source]:
        """The sources that answer record by record; the others are made at the merge."""
        return [source for source in self.sources if source not in WHOLE_SET_SOURCES]

    def num_candidates(self, source: Source) -> int:
        """Number of answers of a source per record."""
        if source == "sample":
            return self.sample.count
        return 1 if source in ("greedy", "edit") else self.select.candidates

    @property
    def queued_sources(self) -> list[Source]:
        """The sources with work for a model record by record: also `edit` by blind probabilities."""
        blind: list[Source] = ["edit"] if "edit" in self.sources and self.edit.by == "blind" else []
        return self.generated_sources + blind
