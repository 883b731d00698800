"""The options of bootstrapping, and the check that every section of the configuration uses."""

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
    """An OpenAI-compatible server (vLLM, SGLang, llama.cpp ...); its key comes from the variable OPENAI_API_KEY.

    Attributes:
        url: Base URL, such as http://localhost:8000/v1; empty: no server.
        model: Name of the model on that server.
        concurrency: Requests in flight at a time.
        timeout_s: Seconds until a request is given up and tried again.
        requests_per_minute: Upper limit; 0 sets none.
        patience_s: The job ends, its finished records kept, when the server answers nothing for so many seconds.
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
            f"server.url is {self.url!r}; write it as http://HOST:PORT/v1",
        )
        check(bool(self.model) or not self.url, "server.url is set but server.model is empty; name the model it serves")
        check(self.concurrency >= 1, f"server.concurrency is {self.concurrency}; it must be at least 1")
        check(self.timeout_s > 0 and self.patience_s > 0, "server.timeout_s and server.patience_s must be positive")
        check(self.requests_per_minute >= 0, "server.requests_per_minute must be 0 (no limit) or more")


@dataclass(kw_only=True)
class WeakenConfig:
    """Negatives from the model's answers to images that say less (types `mllm-hal`, `mllm-crop`, `mllm-mask` ...).

    The sampling options hold for every source in which the multimodal model answers.

    Attributes:
        noise_step: Step t of the forward diffusion x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, 0..999; -1: none.
        noise_steps: Several steps, of which each record gets one by its seed; empty takes `noise_step` for all.
        space: Where noise is added: to the `normalised` pixels that the model takes (the paper), or to the `pixel`s of
            the picture before its processor (clipped to 0..255), all that a server or vLLM can be sent.
        pixel_side: In pixel space a picture is first scaled down to this longer side, or scaling down afterwards would
            average the noise away; 0 leaves its size.
        crop_share: Share of the area that the source `crop` shows, at a place of the record's seed.
        mask_share: Share of a 14 x 14 grid of cells that the source `mask` covers in grey.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus of the sampling distribution.
        max_new_tokens: Longest answer.
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
        check(self.pixel_side >= 0, "bootstrap.weaken.pixel_side must be 0 (leave the size) or more")
        for name in ("crop_share", "mask_share"):
            check(0 < getattr(self, name) < 1, f"bootstrap.weaken.{name} must lie in (0, 1)")
        _check_sampling("bootstrap.weaken", self.temperature, self.top_p, self.max_new_tokens)


@dataclass(kw_only=True)
class RegenerateConfig:
    """Negatives that begin as the annotation does and go on as the model would (type `mllm-cont`).

    Attributes:
        cut_min: Least share of the annotation's words that is kept; the record's seed draws between the two.
        cut_max: Largest share that is kept.
        weakened: Show the model the weakened image and not the clean one.
    """

    cut_min: float = 0.2
    cut_max: float = 0.7
    weakened: bool = True

    def __post_init__(self) -> None:
        check(0 < self.cut_min <= self.cut_max < 1, "bootstrap.regenerate: 0 < cut_min <= cut_max < 1 must hold")


@dataclass(kw_only=True)
class VisionConfig:
    """What runs the multimodal model that answers images; weights are `model.path`, or the server's.

    Attributes:
        engine: `transformers` in this process; `vllm` in this process (extra `vllm`); `server`.
        server: Where `engine` is `server`.
    """

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        check(
            (self.engine == "server") == bool(self.server.url),
            "bootstrap.vision: engine `server` and server.url go together; set both or neither",
        )


@dataclass(kw_only=True)
class InjectConfig:
    """Negatives from a text-only LLM that rewrites the annotation with plausible errors (type `llm-hal`).

    Attributes:
        mode: `description` rewrites a description; `qa` answers for a similar but different image; `auto` takes
            `description` for prompts that ask for one and `qa` for others.
        prompt_dir: Folder with your own description.yaml and qa.yaml; empty takes those in bpo/bootstrap/prompts. Small
            LLMs need worked examples in the style of the annotations.
        llm: Directory of a transformers causal LM; empty takes the multimodal model's own language model.
        gguf_file: Name of a GGUF file in that directory, when its weights come as one.
        engine: What runs `llm`: `transformers`, or `vllm` (extra `vllm`).
        server: An OpenAI-compatible server in place of `llm`.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus of the sampling distribution.
        max_new_tokens: Longest rewriting.
        attempts: Tries for a record whose rewriting was refused, each with its own seed.
        dtype: Precision of the text-only LLM.
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
            "bootstrap.inject.engine is vllm but llm is empty; name the text-only LLM that it is to load",
        )


@dataclass(kw_only=True)
class ValidateConfig:
    """When a negative is refused, beside what is always refused: empty, cut off, or the annotation itself.

    Attributes:
        max_repeats: Times that a phrase of up to 8 words may stand in a row.
        min_distinct_share: Least share of different words among 12 words or more; 0 asks for none.
        min_changed_words: Least number of words in which it differs from the annotation.
        max_changed_share: Largest share of words in which an injected error may differ; 1 sets no bound.
        min_length_ratio: Least words against the annotation's, both counted with 8 words more.
        max_length_ratio: Most words against the annotation's, both counted with 8 words more.
        require_real_change: Refuse what changes style alone: no object, attribute, count, relation or unknown word.
        same_language: Refuse another script or, where function words tell, another language than the annotation's.
        refuse_duplicates: Of a group's negatives with the same words keep the first alone.
        lexicon: Your own file of objects, attributes ... in place of bpo/bootstrap/lexicon/en.yaml, of the same form.
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
        check(0 <= self.min_distinct_share < 1, "bootstrap.validate.min_distinct_share must lie in [0, 1)")
        check(self.min_changed_words >= 0, "bootstrap.validate.min_changed_words must be 0 or more")
        check(0 < self.max_changed_share <= 1, "bootstrap.validate.max_changed_share must lie in (0, 1]")
        check(
            0 <= self.min_length_ratio <= 1 <= self.max_length_ratio,
            "bootstrap.validate: min_length_ratio must lie in [0, 1] and max_length_ratio be 1 or more",
        )


@dataclass(kw_only=True)
class BootstrapConfig:
    """How negatives are made from annotations.

    Attributes:
        sources: Which negatives to make. The paper's: `weaken` (answers to noised images) and `inject` (errors written
            into the annotation). Further: `crop` and `mask` (answers to a part of the image), `regenerate` (the
            annotation's beginning, continued), `text-only` (answers without any image), `unweakened` (answers to the
            clean image, a control).
        weaken: Options of the weakened image, and sampling of all the multimodal model's answers.
        inject: Options of the injected errors.
        regenerate: Where an annotation is cut.
        vision: What runs the multimodal model.
        validate: When a negative is refused.
        target_shares: Source -> share of the negatives that it is to have; what others made beyond that is left out by
            the seed. Empty keeps all.
        batch_size: Answers generated at a time.
        cache: Where transformers keeps keys and values: `reserved` appends in place, `dynamic` copies them for every
            token, `static` has one size, for which transformers compiles decoding on CUDA (without shared prefixes).
        seed: With the record's id it decides noise and sampling.
        limit: Use only the first so many annotations; 0 takes all.
        max_inject_records: Inject errors into only the first so many annotations; 0 takes all.
        num_shards: Jobs that share the annotations, such as tasks of an array; after more than one comes `bpo merge`.
        shard_index: Which of them this is, from 0.
        claim_timeout_s: The work of a rank that gave no sign of life for so many seconds goes to others.
        num_workers: Threads that read and weaken the images of the next batch; 0: none is prepared ahead. By default
            1 beside a model in this process, which more of them would keep from its work, and 8 for a server or vLLM.
        max_idle_restarts: Starts by SLURM that finish no batch, after which the job gives up; 0 never does.
        stall_timeout_s: Rank 0 gives up waiting for what living ranks have claimed when none finished a batch for so
            many seconds.
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
            check(source in self.sources, f"bootstrap.target_shares.{source}: not among bootstrap.sources")
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
            "bootstrap.num_workers must be 0 (prepare no batch ahead) or more",
        )
        if "weaken" in self.sources and self.vision.engine != "transformers":
            check(
                self.weaken.space == "pixel",
                f"bootstrap.vision.engine {self.vision.engine} takes pictures, not normalised pixels; set "
                "bootstrap.weaken.space pixel",
            )
        check(
            len(self.sources) == len(set(self.sources)) and bool(self.sources),
            "bootstrap.sources must name each source once",
        )


def _check_sampling(where: str, temperature: float, top_p: float, max_new_tokens: int) -> None:
    check(temperature >= 0, f"{where}.temperature is {temperature}; it must be 0 (greedy) or more")
    check(0 < top_p <= 1, f"{where}.top_p is {top_p}; it must lie in (0, 1]")
    check(max_new_tokens >= 1, f"{where}.max_new_tokens is {max_new_tokens}; it must be at least 1")
