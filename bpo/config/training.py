"""Every option of bpo: one tree of dataclasses with all defaults, a line of documentation a field, range checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpo.config.bootstrap import BootstrapConfig, check


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, and how it is held.

    Attributes:
        path: Directory (or hub id) that `AutoModelForImageTextToText.from_pretrained` reads.
        dtype: Weights and activations: float32, bfloat16 or float16; `config` takes what the model's config says.
        attention: How packed groups attend: `flash` (flash-attn 3 or 2, on CUDA in half precision), `varlen` (PyTorch's
            copy of flash-attn 2, likewise), `flex` (FlexAttention, on CUDA), `sdpa`; `auto` takes the first of these
            that the machine has, on CPU sdpa.
        vision_attention: Attention implementation of the vision tower, as transformers names it.
        gradient_checkpointing: What the backward pass computes again: `none`; `full`, whole layers, of which it keeps
            the inputs; `selective`, all but matrix products and attention. true means full, false none.
        share_prefix: `auto` computes image and prompt once for all completions of a group where the model's attention
            allows it; `never` gives each completion its own copy, in padded rows: same results, more work.
        trust_remote_code: Run code that comes with the model. Leave it off for models you did not write.
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
    """Where the data lies and what fits.

    Attributes:
        annotations: File whose answers become the chosen side: LLaVA, ShareGPT, COCO captions, CSV (docs/data.md).
        groups: Preference groups, JSONL (or the paper's release, TRL, RLHF-V ...): written by bootstrap, read by train.
        image_root: Folder that image paths are relative to; no path may leave it.
        max_length_tokens: Longest sequence, prefix and one completion; completions are cut to it, prompts never.
        max_completion_words: No negative is longer; a group with a longer completion is dropped, as in the paper.
        keep_lengths: Keep measured lengths beside the groups (GROUPS.lengths): a restart then opens no image whose file
            has the size and modification time that it had.
        on_bad: What becomes of a record or image that cannot be used: `quarantine` lists it and goes on, `error` stops.
        max_bad_share: Largest share of bad records with which a stage goes on.
        text_only: What becomes of groups without an image: `drop` lists them in dropped.jsonl (such a pair teaches no
            looking), `keep` trains on them among the others.
        num_workers: Processes that decode and preprocess images ahead of training; 0 does it in line.
        prefetch_factor: Micro-batches that each of these processes prepares ahead, in host memory.
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
        check(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}; it must lie in [0, 1]")
        check(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; it must be 0 or more")
        check(self.prefetch_factor >= 1, f"data.prefetch_factor is {self.prefetch_factor}; it must be at least 1")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adaptation of the language model (the paper's values).

    Attributes:
        r: Rank.
        alpha: Scale; the adapter's output is multiplied by alpha / r.
        dropout: Dropout before the adapter.
        target: Names of linear layers to adapt; empty takes every linear of the language model (never the LM head).
    """

    r: int = 32
    alpha: float = 256.0
    dropout: float = 0.05
    target: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.r >= 1, f"lora.r is {self.r}; it must be at least 1")
        check(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must lie in [0, 1)")


@dataclass(kw_only=True)
class TrainableConfig:
    """What learns.

    Attributes:
        language: The language model: by LoRA, in full, or frozen.
        projector: The map from vision features to the language model.
        vision: The vision tower.
        lm_head: The LM head and the token embeddings, when `language` is full.
    """

    language: Literal["lora", "full", "frozen"] = "lora"
    projector: Literal["full", "frozen"] = "full"
    vision: Literal["full", "frozen"] = "frozen"
    lm_head: Literal["full", "frozen"] = "full"

    def __post_init__(self) -> None:
        check(
            self.language != "frozen" or self.projector == "full" or self.vision == "full",
            "trainable: language, projector and vision are all frozen; nothing would learn",
        )


@dataclass(kw_only=True)
class LossConfig:
    """The preference loss.

    Attributes:
        type: Name of a loss in bpo/losses.py: sigmoid (DPO), hinge, ipo, robust, sft (chosen side alone, a control).
        beta: Inverse temperature of the implicit reward.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.
        chosen_nll_weight: Weight of the mean negative log-likelihood per token of the chosen answers in the loss.
    """

    type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    chosen_nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check(self.beta > 0, f"loss.beta is {self.beta}; it must be positive")
        check(
            0 <= self.label_smoothing < 0.5,
            f"loss.label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5)",
        )
        check(
            self.chosen_nll_weight >= 0,
            f"loss.chosen_nll_weight is {self.chosen_nll_weight}; it must be 0 or more",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """Optimisation, batches and saving.

    Attributes:
        output_dir: Where checkpoints, metrics and the reference store go.
        ds_config: ZeRO, offload and communication: a file such as ds_configs/zero3.json (also installed).
        epochs: Passes over the groups.
        max_steps: Stop after so many optimizer steps; 0 runs all epochs.
        groups_per_step: Groups in one optimizer step over all ranks; its content is the same for any number of them.
        max_micro_batch_tokens: Packed tokens in one forward pass of one rank.
        completion_types: Train only on completions of these types (the best-scored are always kept); empty: all.
        lr: Peak learning rate.
        projector_lr: Peak learning rate of the projector; 0 takes `lr`.
        lr_schedule: Shape after warm-up.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        weight_decay: Decoupled weight decay.
        adam_beta1: Decay of AdamW's first moment.
        adam_beta2: Decay of AdamW's second moment.
        adam_eps: AdamW's epsilon.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        seed: Order of the groups, dropout and the adapter's initialisation.
        save_every_steps: A checkpoint every so many steps; 0 saves at the end only.
        keep_last: Newest checkpoints that are kept; 0 keeps all.
        keep_every: Checkpoints of steps divisible by it are kept besides; 0 keeps none besides.
        save_in_background: Write checkpoints while training goes on, from a copy in host memory.
        hang_timeout_seconds: A rank that is silent or does not move for so long ends the job; 0 watches nothing.
        max_idle_restarts: Resumed starts without a new checkpoint after which the run gives up; 0 never does.
        accept_changes: Options (or `data`, `weights`, `plan`) that may differ from the checkpoint's when resuming.
        log_every_steps: Metrics every so many steps.
        resume: Continue from the newest checkpoint in output_dir.
        tensorboard: Write TensorBoard files beside metrics.jsonl.
        reference_dir: The reference store; empty puts it in output_dir/reference. Runs may share one.
        reference_micro_batch_tokens: Packed tokens in one forward pass of the reference, which keeps no activations;
            0 takes 4 times max_micro_batch_tokens.
        rehash_weights: Hash the model's files at start even where path, size, time and inode are as they were.
        first_loss_tolerance: Allowed gap between the first step's loss and its value for policy = reference;
            0 takes 1e-4 in float32 and 2e-2 in half precision.
        peak_tflops: Peak of one device in TFLOP/s, which MFU is a share of; 0 looks the device's name up.
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
        check(0 <= self.warmup_ratio < 1, f"train.warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1)")
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
    """What `bpo evaluate` measures.

    Attributes:
        output: JSON file for the results.
        chair_instances: COCO instances JSON (`images`, `annotations`, `categories`); empty skips CHAIR.
        chair_captions: COCO captions JSON; objects named there count as present too.
        synonyms: One line an object: canonical name, then its synonyms; empty takes the categories' names.
        chair_prompt: The request for a description.
        pope_questions: POPE files (JSONL: question_id, image, text, label); the file's name gives the split.
        max_new_tokens: Longest answer.
        batch_size: Answers generated at a time.
        limit: Score only the first so many images and questions; 0 takes all.
        max_idle_restarts: Starts by SLURM that add no answer, after which the job gives up; 0 never does.
        stall_timeout_s: Rank 0 gives up waiting for the other ranks when none answered a batch for so many seconds.
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
    """What `bpo export` writes.

    Attributes:
        checkpoint: A checkpoint directory, or a run's output_dir for its newest checkpoint.
        output: Directory to write.
        form: `merged` writes whole weights and the processor; `adapter` only what was trained, as a PEFT adapter.
    """

    checkpoint: str = ""
    output: str = ""
    form: Literal["merged", "adapter"] = "merged"


@dataclass(kw_only=True)
class Config:
    """The whole configuration.

    Attributes:
        model: Which model, and how it is held.
        data: Where the data lies and what fits.
        bootstrap: How negatives are made from annotations.
        lora: Low-rank adaptation of the language model.
        trainable: What learns.
        loss: The preference loss.
        train: Optimisation, batches and saving.
        evaluation: What `bpo evaluate` measures.
        export: What `bpo export` writes.
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
