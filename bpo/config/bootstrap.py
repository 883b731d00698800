"""Bootstrapping options, and the `check` helper of all configuration sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["weaken", "inject", "crop", "mask", "regenerate", "text-only", "unweakened"]
CacheKind = Literal["reserved", "dynamic", "static"]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(kw_only=True)
class ServerConfig:
    """OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...). The API key is read from OPENAI_API_KEY.

    Attributes:
        url: Base URL, such as http://localhost:8000/v1. Empty disables the server.
        model: Name of the model on the server.
        concurrency: Maximum number of concurrent requests.
        timeout_s: Timeout of a request in seconds, after which it is retried.
        requests_per_minute: Rate limit in requests per minute; 0 means no limit.
        patience_s: Seconds without any response after which the job stops; finished records are kept.
    """

    url: str = ""
    model: str = ""
    concurrency: int = 16
    timeout_s: float = 120.0
    requests_per_minute: float = 0.0
    patience_s: float = 900.0

    def __post_init__(self) -> None:
        check(
            not self.url or self.url.startswith(("http://", "https://")),
            f"server.url is {self.url!r}; it must have the form http://HOST:PORT/v1",
        )
        check(bool(self.model) or not self.url, "server.url is set but server.model is empty; set the served model")
        check(self.concurrency >= 1, f"server.concurrency is {self.concurrency}; it must be at least 1")
        check(self.timeout_s > 0 and self.patience_s > 0, "server.timeout_s and server.patience_s must be positive")
        check(self.requests_per_minute >= 0, "server.requests_per_minute must be 0 (no limit) or more")


@dataclass(kw_only=True)
class WeakenConfig:
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

    noise_step: int = 900
    noise_steps: list[int] = field(default_factory=list)
    space: Literal["normalised", "pixel"] = "normalised"
    pixel_side: int = 336
    crop_share: float = 0.15
    mask_share: float = 0.8
    temperature: float = 0.2
    top_p: float = 1.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        for step in (self.noise_step, *self.noise_steps):
            check(-1 <= step <= 999, f"noise_step is {step}; the schedule has steps 0..999 (-1: no noise)")
        check(self.pixel_side >= 0, "bootstrap.weaken.pixel_side must be 0 (keep the size) or more")
        for name in ("crop_share", "mask_share"):
            check(0 < getattr(self, name) < 1, f"bootstrap.weaken.{name} must be in (0, 1)")
        _check_sampling("bootstrap.weaken", self.temperature, self.top_p, self.max_new_tokens)


@dataclass(kw_only=True)
class RegenerateConfig:
    """Negatives that keep the start of the annotation and are continued by the model (type `mllm-cont`).

    Attributes:
        cut_min: Smallest fraction of the annotation's words to keep; the fraction is drawn per record.
        cut_max: Largest fraction of the annotation's words to keep.
        weakened: Whether to show the model the weakened image instead of the clean one.
    """

    cut_min: float = 0.2
    cut_max: float = 0.7
    weakened: bool = True

    def __post_init__(self) -> None:
        check(0 < self.cut_min <= self.cut_max < 1, "bootstrap.regenerate requires 0 < cut_min <= cut_max < 1")


@dataclass(kw_only=True)
class VisionConfig:
    """Inference engine of the multimodal model. Weights are loaded from `model.path`, or by the server.

    Attributes:
        engine: `transformers` or `vllm` (requires the extra `vllm`) run in this process; `server` sends requests.
        server: Server options, used if `engine` is `server`.
    """

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        check(
            (self.engine == "server") == bool(self.server.url),
            "bootstrap.vision: engine `server` and server.url require each other; set both or neither",
        )


@dataclass(kw_only=True)
class InjectConfig:
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
        attempts: Maximum number of attempts per record if its rewriting is rejected, each with a different seed.
        dtype: Data type of the text-only LLM.
    """

    mode: Literal["description", "qa", "auto"] = "auto"
    prompt_dir: str = ""
    llm: str = ""
    gguf_file: str = ""
    engine: Literal["transformers", "vllm"] = "transformers"
    server: ServerConfig = field(default_factory=ServerConfig)
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    attempts: int = 1
    dtype: Literal["float32", "bfloat16", "float16", "config"] = "config"

    def __post_init__(self) -> None:
        _check_sampling("bootstrap.inject", self.temperature, self.top_p, self.max_new_tokens)
        check(self.attempts >= 1, f"bootstrap.inject.attempts is {self.attempts}; it must be at least 1")
        both = self.llm and self.server.url
        check(not both, "bootstrap.inject.llm and bootstrap.inject.server.url are both set; choose one")
        check(
            self.engine == "transformers" or bool(self.llm),
            "bootstrap.inject.engine is vllm but llm is empty; set llm to the text-only LLM to load",
        )


@dataclass(kw_only=True)
class ValidateConfig:
    """Validation of negatives. Empty, truncated and unchanged texts are always rejected.

    Attributes:
        max_repeats: Maximum number of consecutive repeats of a phrase of up to 8 words.
        min_distinct_share: Minimum fraction of distinct words in texts of 12 or more words; 0 disables the check.
        min_changed_words: Minimum number of words that differ from the annotation.
        max_changed_share: Maximum fraction of words that may differ in an injected error; 1 means no limit.
        min_length_ratio: Minimum ratio of the word counts of negative and annotation, after adding 8 to each.
        max_length_ratio: Maximum ratio of the word counts of negative and annotation, after adding 8 to each.
        require_real_change: Reject changes of style only: no object, attribute, count, relation or unknown word.
        same_language: Reject a script, or a language identified by function words, that differs from the annotation's.
        refuse_duplicates: Keep only the first of a group's negatives with the same words.
        lexicon: Custom file of objects, attributes, ... in the format of bpo/bootstrap/lexicon/en.yaml, used instead.
    """

    max_repeats: int = 3
    min_distinct_share: float = 0.25
    min_changed_words: int = 1
    max_changed_share: float = 1.0
    min_length_ratio: float = 0.1
    max_length_ratio: float = 10.0
    require_real_change: bool = True
    same_language: bool = True
    refuse_duplicates: bool = True
    lexicon: str = ""

    def __post_init__(self) -> None:
        check(self.max_repeats >= 1, "bootstrap.validate.max_repeats must be 1 or more")
        check(0 <= self.min_distinct_share < 1, "bootstrap.validate.min_distinct_share must be in [0, 1)")
        check(self.min_changed_words >= 0, "bootstrap.validate.min_changed_words must be 0 or more")
        check(0 < self.max_changed_share <= 1, "bootstrap.validate.max_changed_share must be in (0, 1]")
        check(
            0 <= self.min_length_ratio <= 1 <= self.max_length_ratio,
            "bootstrap.validate: min_length_ratio must be in [0, 1], and max_length_ratio 1 or more",
        )


@dataclass(kw_only=True)
class BootstrapConfig:
    """Generation of negatives from annotations.

    Attributes:
        sources: Sources of negatives. From the paper: `weaken` (answers to noised images) and `inject` (annotations
            with injected errors). Additional: `crop` and `mask` (answers to a part of the image), `regenerate`
            (continuations of the annotation's start), `text-only` (answers without an image), `unweakened` (answers
            to the clean image, as a control).
        weaken: Image weakening, and sampling options of the multimodal model.
        inject: Error injection.
        regenerate: Truncation of annotations before their continuation.
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
        num_shards: Number of jobs that share the annotations, such as array tasks; if above 1, finish with `bpo merge`.
        shard_index: Index of this job, starting from 0.
        claim_timeout_s: Seconds without a heartbeat after which the work of a rank is reassigned.
        num_workers: Number of threads that read and weaken images of the next batch; 0 disables prefetching. Default: 1
            with a model in this process, which more threads would slow down, and 8 with a server or vLLM.
        max_idle_restarts: Maximum SLURM restarts without a finished batch before the job fails; 0 means no limit.
        stall_timeout_s: Seconds without a batch finished by any rank after which rank 0 stops waiting for claimed work.
    """

    sources: list[Source] = field(default_factory=lambda: ["weaken", "inject"])
    weaken: WeakenConfig = field(default_factory=WeakenConfig)
    inject: InjectConfig = field(default_factory=InjectConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    target_shares: dict[str, float] = field(default_factory=dict)
    batch_size: int = 16
    cache: CacheKind = "reserved"
    seed: int = 0
    limit: int = 0
    max_inject_records: int = 0
    num_shards: int = 1
    shard_index: int = 0
    claim_timeout_s: float = 120.0
    num_workers: int | None = None
    max_idle_restarts: int = 3
    stall_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for source, share in self.target_shares.items():
            check(source in self.sources, f"bootstrap.target_shares.{source} is not in bootstrap.sources")
            check(share > 0, f"bootstrap.target_shares.{source} is {share}; it must be positive")
        check(self.batch_size >= 1, f"bootstrap.batch_size is {self.batch_size}; it must be at least 1")
        check(self.limit >= 0, f"bootstrap.limit is {self.limit}; it must be 0 (all) or more")
        check(self.max_inject_records >= 0, "bootstrap.max_inject_records must be 0 (all) or more")
        check(self.num_shards >= 1, f"bootstrap.num_shards is {self.num_shards}; it must be at least 1")
        check(
            0 <= self.shard_index < self.num_shards,
            f"bootstrap.shard_index is {self.shard_index}; it must be 0 or more and below num_shards {self.num_shards}",
        )
        check(self.max_idle_restarts >= 0, "bootstrap.max_idle_restarts must be 0 (no limit) or more")
        check(self.stall_timeout_s > 0, "bootstrap.stall_timeout_s must be positive")
        check(self.claim_timeout_s > 0, "bootstrap.claim_timeout_s must be positive")
        check(
            self.num_workers is None or self.num_workers >= 0,
            "bootstrap.num_workers must be 0 (no prefetching) or more",
        )
        if "weaken" in self.sources and self.vision.engine != "transformers":
            check(
                self.weaken.space == "pixel",
                f"bootstrap.vision.engine {self.vision.engine} takes images, not normalised pixels; set "
                "bootstrap.weaken.space to pixel",
            )
        check(
            len(self.sources) == len(set(self.sources)) and bool(self.sources),
            "bootstrap.sources must not be empty or contain duplicates",
        )


def _check_sampling(where: str, temperature: float, top_p: float, max_new_tokens: int) -> None:
    check(temperature >= 0, f"{where}.temperature is {temperature}; it must be 0 (greedy) or more")
    check(0 < top_p <= 1, f"{where}.top_p is {top_p}; it must be in (0, 1]")
    check(max_new_tokens >= 1, f"{where}.max_new_tokens is {max_new_tokens}; it must be at least 1")
