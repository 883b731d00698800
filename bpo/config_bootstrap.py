"""The options of bootstrapping, and the check that every section of the configuration uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(kw_only=True)
class WeakenConfig:
    """Negatives from the model's answer to a noised image (type `mllm-hal`).

    Attributes:
        noise_step: Step t of the forward diffusion x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, 0..999; -1: none.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus of the sampling distribution.
        max_new_tokens: Longest answer.
    """

    noise_step: int = 900
    temperature: float = 0.2
    top_p: float = 1.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        check(
            -1 <= self.noise_step <= 999,
            f"noise_step is {self.noise_step}; the schedule has steps 0..999 (-1: no noise)",
        )
        _check_sampling("bootstrap.weaken", self.temperature, self.top_p, self.max_new_tokens)


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
        server_url: Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; replaces `llm`.
        server_model: Name of the model on that server.
        server_concurrency: Requests in flight at a time.
        server_timeout_s: Seconds until a request is given up and tried again.
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
    server_url: str = ""
    server_model: str = ""
    server_concurrency: int = 16
    server_timeout_s: float = 120.0
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    attempts: int = 1
    dtype: Literal["float32", "bfloat16", "float16", "config"] = "config"

    def __post_init__(self) -> None:
        _check_sampling("bootstrap.inject", self.temperature, self.top_p, self.max_new_tokens)
        check(self.attempts >= 1, f"bootstrap.inject.attempts is {self.attempts}; it must be at least 1")
        check(self.server_concurrency >= 1, "bootstrap.inject.server_concurrency must be at least 1")
        both = self.llm and self.server_url
        check(not both, "bootstrap.inject.llm and bootstrap.inject.server_url are both set; choose one")
        check(
            bool(self.server_model) or not self.server_url,
            "bootstrap.inject.server_url is set but server_model is empty; name the model the server serves",
        )


@dataclass(kw_only=True)
class ValidateConfig:
    """When a negative is refused, beside what is always refused: empty, broken, cut off, or the annotation itself.

    Attributes:
        min_changed_words: Least number of words in which it differs from the annotation.
        max_changed_share: Largest share of words in which an injected error may differ; 1 sets no bound.
        min_length_ratio: Least words against the annotation's, both counted with 8 words more.
        max_length_ratio: Most words against the annotation's, both counted with 8 words more.
        require_real_change: Refuse what changes style alone: no object, attribute, count, relation or unknown word.
        same_language: Refuse another script or, where function words tell, another language than the annotation's.
        lexicon: Your own file of objects, attributes ... in place of bpo/bootstrap/lexicon/en.yaml, of the same form.
    """

    min_changed_words: int = 1
    max_changed_share: float = 1.0
    min_length_ratio: float = 0.1
    max_length_ratio: float = 10.0
    require_real_change: bool = True
    same_language: bool = True
    lexicon: str = ""

    def __post_init__(self) -> None:
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
        sources: Which negatives to make: weaken, inject, unweakened (the model's answer to the clean image, a control).
        weaken: Options of the weakened image.
        inject: Options of the injected errors.
        validate: When a negative is refused.
        batch_size: Answers generated at a time.
        seed: With the record's id it decides noise and sampling.
        limit: Use only the first so many annotations; 0 takes all.
        max_inject_records: Inject errors into only the first so many annotations; 0 takes all.
        stall_timeout_s: Rank 0 gives up waiting for the other ranks when none finished a batch for so many seconds.
    """

    sources: list[Literal["weaken", "inject", "unweakened"]] = field(default_factory=lambda: ["weaken", "inject"])
    weaken: WeakenConfig = field(default_factory=WeakenConfig)
    inject: InjectConfig = field(default_factory=InjectConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    batch_size: int = 16
    seed: int = 0
    limit: int = 0
    max_inject_records: int = 0
    stall_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, f"bootstrap.batch_size is {self.batch_size}; it must be at least 1")
        check(self.limit >= 0, f"bootstrap.limit is {self.limit}; it must be 0 (all) or more")
        check(self.max_inject_records >= 0, "bootstrap.max_inject_records must be 0 (all) or more")
        check(self.stall_timeout_s > 0, "bootstrap.stall_timeout_s must be positive")
        check(
            len(self.sources) == len(set(self.sources)) and bool(self.sources),
            "bootstrap.sources must name each source once",
        )


def _check_sampling(where: str, temperature: float, top_p: float, max_new_tokens: int) -> None:
    check(temperature >= 0, f"{where}.temperature is {temperature}; it must be 0 (greedy) or more")
    check(0 < top_p <= 1, f"{where}.top_p is {top_p}; it must lie in (0, 1]")
    check(max_new_tokens >= 1, f"{where}.max_new_tokens is {max_new_tokens}; it must be at least 1")
