"""All options of bpo: a tree of dataclasses with defaults, documentation (shown by --help) and range checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpo.config.bootstrap import BootstrapConfig, check


@dataclass(kw_only=True)
class ModelConfig:
    """Model loading and execution.

    Attributes:
        path: Model directory or Hub id, as for `AutoModelForImageTextToText.from_pretrained`.
        dtype: Data type of weights and activations: float32, bfloat16 or float16; `config` uses the model config's.
        attention: Attention backend for packed groups: `flash` (flash-attn 3 or 2; CUDA, half precision), `varlen`
            (PyTorch's copy of flash-attn 2; CUDA, half precision), `flex` (FlexAttention; CUDA) or `sdpa`; `auto`
            selects the first available in this order, and `sdpa` on CPU.
        vision_attention: Attention implementation of the vision tower, by its name in transformers.
        gradient_checkpointing: What to recompute in the backward pass: `none`; `full` recomputes layers from their
            inputs; `selective` recomputes all but matrix products and attention. true means `full`, false `none`.
        share_prefix: `auto` computes image and prompt once per group if the model's attention supports it; `never` uses
            a separate padded sequence per completion, with the same results and more compute.
        trust_remote_code: Run code shipped with the model. Enable only for models you trust.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16", "float16", "config"] = "bfloat16"
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = "auto"
    vision_attention: str = "sdpa"
    gradient_checkpointing: Literal["none", "full", "selective"] | bool = "none"
    share_prefix: Literal["auto", "never"] = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"


@dataclass(kw_only=True)
class DataConfig:
    """Data files, length limits and handling of bad records.

    Attributes:
        annotations: File whose answers become chosen completions: LLaVA, ShareGPT, COCO captions, CSV (docs/data.md).
        groups: Preference groups, written by bootstrap and read by train: JSONL, the paper's release, TRL, RLHF-V, ...
        image_root: Base folder of image paths; paths must not lead out of it.
        max_length_tokens: Maximum length of prefix plus one completion; completions are truncated to it, prompts never.
        max_completion_words: Maximum words per completion; groups with a longer one are dropped, as in the paper.
        keep_lengths: Cache measured lengths in GROUPS.lengths, so that a restart does not open images whose size and
            modification time are unchanged.
        on_bad: Handling of unusable records and images: `quarantine` lists them and continues, `error` stops.
        max_bad_share: Maximum fraction of bad records; a stage fails above it.
        text_only: Handling of groups without an image: `drop` lists them in dropped.jsonl, since they give no visual
            grounding signal; `keep` trains on them.
        num_workers: Number of processes that decode and preprocess images during training; 0 uses the main process.
        prefetch_factor: Number of micro-batches prefetched to host memory by each worker process.
    """

    annotations: str = ""
    groups: str = ""
    image_root: str = ""
    max_length_tokens: int = 2048
    max_completion_words: int = 350
    keep_lengths: bool = True
    on_bad: Literal["quarantine", "error"] = "quarantine"
    max_bad_share: float = 0.1
    text_only: Literal["drop", "keep"] = "drop"
    num_workers: int = 2
    prefetch_factor: int = 2

    def __post_init__(self) -> None:
        check(
            self.max_length_tokens > 0,
            f"data.max_length_tokens is {self.max_length_tokens}; it must be positive",
        )
        check(
            self.max_completion_words > 0,
            f"data.max_completion_words is {self.max_completion_words}; it must be positive",
        )
        check(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}; it must be in [0, 1]")
        check(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; it must be 0 or more")
        check(self.prefetch_factor >= 1, f"data.prefetch_factor is {self.prefetch_factor}; it must be at least 1")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adaptation (LoRA) of the language model. Defaults are the paper's.

    Attributes:
        r: Rank of the adapter.
        alpha: Scale of the adapter; its output is multiplied by alpha / r.
        dropout: Dropout probability of the adapter's input.
        target: Names of the linear layers to adapt; empty adapts all of the language model except the LM head.
    """

    r: int = 32
    alpha: float = 256.0
    dropout: float = 0.05
    target: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.r >= 1, f"lora.r is {self.r}; it must be at least 1")
        check(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(kw_only=True)
class TrainableConfig:
    """Trainable parts of the model.

    Attributes:
        language: How to train the language model: `lora`, `full` or `frozen`.
        projector: How to train the projector from vision features to the language model.
        vision: How to train the vision tower.
        lm_head: How to train the LM head and token embeddings, if `language` is `full`.
    """

    language: Literal["lora", "full", "frozen"] = "lora"
    projector: Literal["full", "frozen"] = "full"
    vision: Literal["full", "frozen"] = "frozen"
    lm_head: Literal["full", "frozen"] = "full"

    def __post_init__(self) -> None:
        check(
            self.language != "frozen" or self.projector == "full" or self.vision == "full",
            "trainable: language, projector and vision are all frozen; make at least one trainable",
        )


@dataclass(kw_only=True)
class LossConfig:
    """Preference loss.

    Attributes:
        type: Loss in bpo/losses.py: sigmoid (DPO), hinge, ipo, robust or sft (chosen completions only, as a control).
        beta: Inverse temperature of the implicit reward.
        label_smoothing: Assumed fraction of pairs with swapped labels.
        chosen_nll_weight: Weight of the mean negative log-likelihood per token of the chosen completions.
    """

    type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    chosen_nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check(self.beta > 0, f"loss.beta is {self.beta}; it must be positive")
        check(
            0 <= self.label_smoothing < 0.5,
            f"loss.label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)",
        )
        check(
            self.chosen_nll_weight >= 0,
            f"loss.chosen_nll_weight is {self.chosen_nll_weight}; it must be 0 or more",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """Optimisation, batching, checkpoints and logging.

    Attributes:
        output_dir: Output directory for checkpoints, metrics and the reference store.
        ds_config: DeepSpeed config (ZeRO, offload, communication), such as ds_configs/zero3.json (also installed).
        epochs: Number of passes over the groups.
        max_steps: Maximum number of optimizer steps; 0 runs all epochs.
        groups_per_step: Number of groups per optimizer step over all ranks; its groups do not depend on the ranks.
        max_micro_batch_tokens: Maximum number of packed tokens per forward pass and rank.
        completion_types: Completion types to train on, in addition to the best-scored completions; empty uses all.
        lr: Peak learning rate.
        projector_lr: Peak learning rate of the projector; 0 uses `lr`.
        lr_schedule: Learning rate schedule after warm-up.
        warmup_ratio: Fraction of the steps used for linear warm-up from 0.
        weight_decay: Decoupled weight decay coefficient.
        adam_beta1: Decay rate of AdamW's first moment.
        adam_beta2: Decay rate of AdamW's second moment.
        adam_eps: Epsilon of AdamW.
        max_grad_norm: Maximum gradient norm for clipping; 0 disables clipping.
        seed: Random seed of the group order, dropout and adapter initialisation.
        save_every_steps: Steps between checkpoints; 0 saves only at the end.
        keep_last: Number of latest checkpoints to keep; 0 keeps all.
        keep_every: Also keep checkpoints whose step is a multiple of this number; 0 disables it.
        save_in_background: Write checkpoints from a copy in host memory while training continues.
        hang_timeout_seconds: Seconds without progress of a rank after which the job is aborted; 0 disables the check.
        max_idle_restarts: Maximum restarts without a new checkpoint before the run fails; 0 means no limit.
        accept_changes: Options (or `data`, `weights`, `plan`) that may differ from the checkpoint when resuming.
        log_every_steps: Steps between logged metrics.
        resume: Resume from the latest checkpoint in output_dir.
        tensorboard: Write TensorBoard files in addition to metrics.jsonl.
        reference_dir: Directory of the reference store, which runs may share; empty uses output_dir/reference.
        reference_micro_batch_tokens: Maximum number of packed tokens per forward pass of the reference, which stores no
            activations; 0 uses 4 times max_micro_batch_tokens.
        rehash_weights: Hash the model's files at start even if path, size, modification time and inode are unchanged.
        first_loss_tolerance: Tolerance between the loss of the first step and its value for policy = reference; 0 uses
            1e-4 in float32 and 2e-2 in half precision.
        peak_tflops: Peak TFLOP/s of one device, for MFU; 0 looks it up by the device's name.
    """

    output_dir: str = "runs/train"
    ds_config: str = "ds_configs/zero2.json"
    epochs: int = 2
    max_steps: int = 0
    groups_per_step: int = 32
    max_micro_batch_tokens: int = 8192
    completion_types: list[str] = field(default_factory=list)
    lr: float = 2e-6
    projector_lr: float = 0.0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every_steps: int = 0
    keep_last: int = 3
    keep_every: int = 0
    save_in_background: bool = True
    hang_timeout_seconds: float = 600.0
    max_idle_restarts: int = 3
    accept_changes: list[str] = field(default_factory=list)
    log_every_steps: int = 1
    resume: bool = False
    tensorboard: bool = True
    reference_dir: str = ""
    reference_micro_batch_tokens: int = 0
    rehash_weights: bool = False
    first_loss_tolerance: float = 0.0
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"train.epochs is {self.epochs}; it must be at least 1")
        check(
            self.groups_per_step >= 1,
            f"train.groups_per_step is {self.groups_per_step}; it must be at least 1",
        )
        check(self.max_micro_batch_tokens >= 1, "train.max_micro_batch_tokens must be at least 1")
        check(self.lr > 0, f"train.lr is {self.lr}; it must be positive")
        check(
            self.projector_lr >= 0,
            f"train.projector_lr is {self.projector_lr}; it must be 0 (train.lr) or positive",
        )
        check(0 <= self.warmup_ratio < 1, f"train.warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        check(self.log_every_steps >= 1, "train.log_every_steps must be at least 1")
        for name in (
            "max_steps",
            "save_every_steps",
            "keep_last",
            "keep_every",
            "hang_timeout_seconds",
            "max_idle_restarts",
            "max_grad_norm",
            "weight_decay",
            "reference_micro_batch_tokens",
            "first_loss_tolerance",
            "peak_tflops",
        ):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Benchmarks of `bpo evaluate`.

    Attributes:
        output: JSON file for the results.
        chair_instances: COCO instances JSON (`images`, `annotations`, `categories`); empty skips CHAIR.
        chair_captions: COCO captions JSON; objects mentioned in captions also count as present.
        synonyms: File with one object per line, its canonical name followed by synonyms; empty uses the category names.
        chair_prompt: Prompt that asks for a description.
        pope_questions: POPE files (JSONL: question_id, image, text, label); the split is taken from the file name.
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Number of answers generated per batch.
        limit: Score only the first `limit` images and questions; 0 uses all.
        max_idle_restarts: Maximum SLURM restarts without a new answer before the job fails; 0 means no limit.
        stall_timeout_s: Seconds without a batch answered by any rank after which rank 0 stops waiting for the others.
    """

    output: str = ""
    chair_instances: str = ""
    chair_captions: str = ""
    synonyms: str = ""
    chair_prompt: str = "Describe this image."
    pope_questions: list[str] = field(default_factory=list)
    max_new_tokens: int = 512
    batch_size: int = 16
    limit: int = 0
    max_idle_restarts: int = 3
    stall_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check(self.max_idle_restarts >= 0, "evaluation.max_idle_restarts must be 0 (no limit) or more")
        check(self.stall_timeout_s > 0, "evaluation.stall_timeout_s must be positive")
        check(self.batch_size >= 1, f"evaluation.batch_size is {self.batch_size}; it must be at least 1")
        check(self.max_new_tokens >= 1, "evaluation.max_new_tokens must be at least 1")


@dataclass(kw_only=True)
class ExportConfig:
    """Options of `bpo export`.

    Attributes:
        checkpoint: Checkpoint directory, or a run's output_dir for its latest checkpoint.
        output: Output directory.
        form: `merged` writes full weights and the processor; `adapter` only the trained weights, as a PEFT adapter.
    """

    checkpoint: str = ""
    output: str = ""
    form: Literal["merged", "adapter"] = "merged"


@dataclass(kw_only=True)
class Config:
    """Complete configuration.

    Attributes:
        model: Model loading and execution.
        data: Data files, length limits and handling of bad records.
        bootstrap: Generation of negatives from annotations.
        lora: Low-rank adaptation of the language model.
        trainable: Trainable parts of the model.
        loss: Preference loss.
        train: Optimisation, batching, checkpoints and logging.
        evaluation: Benchmarks of `bpo evaluate`.
        export: Options of `bpo export`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
