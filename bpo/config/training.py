"""All options of bpo: a tree of dataclasses with defaults, documentation (shown by --help) and range checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bpo.config.adapter import base_of, is_adapter
from bpo.config.bootstrap import BootstrapConfig
from bpo.config.evaluation import EvaluationConfig
from bpo.config.export import ExportConfig
from bpo.config.judge import JudgeConfig
from bpo.config.loss import LossConfig
from bpo.config.measure import MeasureConfig
from bpo.config.online import OnlineConfig
from bpo.config.options import NUM_SEEDS, Section, check, needed, number, seconds
from bpo.config.rank import RankConfig
from bpo.config.rounds import RoundsConfig
from bpo.config.selection import SelectionConfig
from bpo.config.tracking import TrackingConfig
from bpo.config.vision import VisionConfig


@dataclass(kw_only=True)
class ModelConfig(Section):
    """Model loading and execution.

    Attributes:
        path: Model directory or Hub id, as for `AutoModelForImageTextToText.from_pretrained`, or a LoRA adapter
            directory, which names its base; training continues the adapter.
        dtype: Data type of weights and activations: float32, bfloat16 or float16; `config` uses the model config's.
        attention: Attention backend for packed groups: `flash` (flash-attn 3 or 2; CUDA, half precision), `varlen`
            (PyTorch's copy of flash-attn 2; CUDA, half precision), `flex` (FlexAttention; CUDA) or `sdpa`; `auto`
            selects the first available in this order (`flex` before `varlen` for models without grouped key heads), and
            `sdpa` on CPU.
        vision_attention: Attention implementation of the vision tower, by its name in transformers.
        gradient_checkpointing: What to recompute in the backward pass: `none`; `full` recomputes layers from their
            inputs; `offload` does so with the inputs in host memory; `selective` recomputes all but matrix products and
            attention. true means `full`, false `none`.
        layer_kernels: Norms, rotary embeddings and gated activations of the language model: `liger` (Liger's Triton
            kernels; pip install 'bpo[fast]'), or `none` for transformers' own; `auto` is `none`.
        patch_embedding: Patch embedding of the vision tower: `gemm` computes its convolution, whose patches do not
            overlap, as one matrix product; `conv` leaves it; `auto` selects by the layer.
        compile: `layers` compiles each decoder layer with torch.compile and pads rows to compile_buckets lengths;
            `none` does not; `auto` is `none`.
        compile_buckets: Number of different row lengths, and so the maximum number of compilations of a layer.
        quantization: Weights of the frozen language model: `nf4` (bitsandbytes; pip install 'bpo[qlora]'), `int8`,
            `fp8` (experimental: products of frozen layers in FP8), or `none` for model.dtype.
        share_prefix: `auto` computes image and prompt once per group if the model's attention supports it; `never` uses
            a separate padded sequence per completion, with the same results and more compute.
        trust_remote_code: Run code shipped with the model. Enable only for models you trust.
    """

    where = "model"

    path: str = ""
    dtype: Literal["float32", "bfloat16", "float16", "config"] = "bfloat16"
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = "auto"
    vision_attention: str = needed("sdpa")
    gradient_checkpointing: Literal["none", "full", "offload", "selective"] | bool = "none"
    layer_kernels: Literal["auto", "liger", "none"] = "auto"
    patch_embedding: Literal["auto", "gemm", "conv"] = "auto"
    compile: Literal["auto", "layers", "none"] = "auto"
    compile_buckets: int = number(4, at_least=1, at_most=64)
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    share_prefix: Literal["auto", "never"] = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"


@dataclass(kw_only=True)
class DataConfig(Section):
    """Data files, length limits and handling of bad records.

    Attributes:
        annotations: File whose answers become chosen completions: LLaVA, ShareGPT, COCO captions, CSV (docs/data.md).
        part: Part of the annotations to use, K/N: those whose id hashes to the K-th of N parts; empty uses all.
        groups: Preference groups, written by bootstrap and read by train: JSONL, the paper's release, TRL, RLHF-V, ...
        image_root: Base folder of image paths; paths must not lead out of it.
        max_length_tokens: Maximum length of prefix plus one completion; completions are truncated to it, prompts never.
        min_pixels: Images with fewer pixels are scaled up to this number, by models that resize by it (Qwen-VL); 0 uses
            the model's own limit. As max_pixels, it applies in bootstrapping, training and evaluation.
        max_pixels: Images with more pixels are scaled down to this number, which limits the tokens of a large image.
        image_aspect: Handling of images that are not square: `processor` leaves it to the image processor, which may
            crop them; `pad` first pads them with the processor's mean colour, as LLaVA-1.5 was trained. As
            system_prompt, it applies in bootstrapping, training and evaluation.
        system_prompt: System turn of prompts that have none of their own; empty adds none.
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

    where = "data"

    annotations: str = ""
    part: str = ""
    groups: str = ""
    image_root: str = ""
    max_length_tokens: int = number(2048, at_least=1)
    min_pixels: int = number(0, at_least=1, zero="the model's own")
    max_pixels: int = number(0, at_least=1, zero="the model's own")
    image_aspect: Literal["processor", "pad"] = "processor"
    system_prompt: str = ""
    max_completion_words: int = number(350, at_least=1)
    keep_lengths: bool = True
    on_bad: Literal["quarantine", "error"] = "quarantine"
    max_bad_share: float = number(0.1, at_least=0, at_most=1)
    text_only: Literal["drop", "keep"] = "drop"
    num_workers: int = number(2, at_least=0, at_most=1024)
    prefetch_factor: int = number(2, at_least=1, at_most=1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.max_pixels or self.min_pixels <= self.max_pixels,
            f"data.min_pixels is {self.min_pixels}, more than data.max_pixels={self.max_pixels}; lower it",
        )
        part = re.fullmatch(r"(\d+)/(\d+)", self.part)
        check(
            not self.part or (part is not None and 1 <= int(part[1]) <= int(part[2])),
            f"data.part is {self.part!r}; write K/N with K from 1 to N, such as 1/3",
        )


@dataclass(kw_only=True)
class LoraConfig(Section):
    """Low-rank adaptation (LoRA) of the language model. Defaults are the paper's.

    Attributes:
        r: Rank of the adapter.
        alpha: Scale of the adapter; its output is multiplied by alpha / r (see variant).
        dropout: Dropout probability of the adapter's input.
        target: Names of the linear layers to adapt; empty adapts all of the language model except the LM head.
        variant: `lora`; `rslora`, which multiplies by alpha / sqrt(r); or `dora`, which also trains column norms.
        kernel: Computation of adapted layers: `fused` (one Triton product of base and adapter), `addmm` (the
            adapter's product accumulated into the base's output) or `peft`; `auto` is `peft`.
    """

    where = "lora"

    r: int = number(32, at_least=1, at_most=2**16)
    alpha: float = number(256.0, above=0)
    dropout: float = number(0.05, at_least=0, below=1)
    target: list[str] = field(default_factory=list)
    variant: Literal["lora", "rslora", "dora"] = "lora"
    kernel: Literal["auto", "fused", "addmm", "peft"] = "auto"

    @property
    def scale(self) -> float:
        """Factor of the adapter's product B A."""
        return self.alpha / (self.r**0.5 if self.variant == "rslora" else self.r)


@dataclass(kw_only=True)
class TrainableConfig(Section):
    """Trainable parts of the model.

    Attributes:
        language: How to train the language model: `lora`, `full` or `frozen`.
        projector: How to train the projector from vision features to the language model.
        vision: How to train the vision tower.
        lm_head: How to train the LM head and token embeddings, if `language` is `full`.
    """

    where = "trainable"

    language: Literal["lora", "full", "frozen"] = "lora"
    projector: Literal["full", "frozen"] = "full"
    vision: Literal["full", "frozen"] = "frozen"
    lm_head: Literal["full", "frozen"] = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.language != "frozen" or self.projector == "full" or self.vision == "full",
            "trainable: language, projector and vision are all frozen; make at least one trainable",
        )


@dataclass(kw_only=True)
class TrainConfig(Section):
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
        accept_changes: Options (or `data`, `weights`, `reference`, `plan`, `plugin`) that may differ from a checkpoint
            in a resumed run.
        log_every_steps: Steps between logged metrics.
        evaluate_every_steps: Steps between evaluations on the held-out groups and on the benchmarks of `evaluation.*`,
            which also take place before the first step and after the last; 0 disables them.
        evaluation_images: Number of images that such an evaluation draws for each benchmark without a number of its
            own; 0 takes all.
        held_out_groups: Share (below 1) or number of groups to evaluate on instead of training on them, chosen by a
            hash of their ids; 0 holds out none. A share stays the same for each group if others are added.
        keep_best: Metric of the evaluations, such as eval/loss or eval/chair/chair_i. The checkpoint of its best step
            is written and kept, and named in checkpoints/best; empty keeps none.
        resume: Resume from the latest checkpoint in output_dir.
        tensorboard: Write TensorBoard files in addition to metrics.jsonl.
        reference_dir: Directory of the reference store, which runs may share; empty uses output_dir/reference.
        reference_model: Model that is the reference instead of the policy before its first step; a store with its
            log-probs must be complete (`reference_only`). Empty: the policy before its first step.
        reference_only: Fill the reference store for model.path and stop before the first step.
        reference_micro_batch_tokens: Maximum number of packed tokens per forward pass of the reference, which stores no
            activations; 0 uses 4 times max_micro_batch_tokens.
        rehash_weights: Hash the model's files at start even if path, size, modification time and inode are unchanged.
        first_loss_tolerance: Tolerance between the loss of the first step and its value for policy = reference; 0 uses
            1e-4 in float32 and 2e-2 in half precision.
        peak_tflops: Peak TFLOP/s of one device, for MFU; 0 looks it up by the device's name.
    """

    where = "train"

    output_dir: str = needed("runs/train")
    ds_config: str = needed("ds_configs/zero2.json")
    epochs: int = number(2, at_least=1)
    max_steps: int = number(0, at_least=0, zero="all epochs")
    groups_per_step: int = number(32, at_least=1)
    max_micro_batch_tokens: int = number(8192, at_least=1)
    completion_types: list[str] = field(default_factory=list)
    lr: float = number(2e-6, above=0)
    projector_lr: float = number(0.0, above=0, zero="train.lr")
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = number(0.03, at_least=0, below=1)
    weight_decay: float = number(0.0, at_least=0)
    adam_beta1: float = number(0.9, at_least=0, below=1)
    adam_beta2: float = number(0.999, at_least=0, below=1)
    adam_eps: float = number(1e-8, above=0)
    max_grad_norm: float = number(1.0, at_least=0, zero="off")
    seed: int = number(0, at_least=0, below=NUM_SEEDS)
    save_every_steps: int = number(0, at_least=0, zero="only at the end")
    keep_last: int = number(3, at_least=0, zero="all")
    keep_every: int = number(0, at_least=0, zero="off")
    save_in_background: bool = True
    hang_timeout_seconds: float = seconds(600.0, at_least=5, zero="off")
    max_idle_restarts: int = number(3, at_least=0, zero="no limit")
    accept_changes: list[str] = field(default_factory=list)
    log_every_steps: int = number(1, at_least=1)
    evaluate_every_steps: int = number(0, at_least=0, zero="off")
    evaluation_images: int = number(64, at_least=0, zero="all")
    held_out_groups: float = number(0.0, at_least=0, zero="none")
    keep_best: str = ""
    resume: bool = False
    tensorboard: bool = True
    reference_dir: str = ""
    reference_model: str = ""
    reference_only: bool = False
    reference_micro_batch_tokens: int = number(0, at_least=0)
    rehash_weights: bool = False
    first_loss_tolerance: float = number(0.0, at_least=0)
    peak_tflops: float = number(0.0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        held_out = self.held_out_groups
        check(
            held_out < 1 or held_out == int(held_out),
            f"train.held_out_groups is {held_out:g}; give a share below 1, or a whole number of groups",
        )
        check(
            not self.keep_best or self.evaluate_every_steps > 0,
            f"train.keep_best is {self.keep_best!r}, but nothing is evaluated; set train.evaluate_every_steps",
        )


@dataclass(kw_only=True)
class Config:
    """Complete configuration.

    Attributes:
        model: Model loading and execution.
        vision: Work of a frozen vision tower.
        data: Data files, length limits and handling of bad records.
        bootstrap: Generation of negatives from annotations.
        measure: Measures of preference groups before training.
        rank: Scoring of candidate answers by a judge.
        select: Selection of preference pairs among scored candidates.
        lora: Low-rank adaptation of the language model.
        trainable: Trainable parts of the model.
        loss: Preference loss.
        train: Optimisation, batching, checkpoints and logging.
        online: Negatives generated during training.
        rounds: Rounds of generation and training.
        tracking: Experiment trackers.
        evaluation: Benchmarks of `bpo evaluate`.
        judge: Judging of answers by a language model.
        export: Options of `bpo export`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    select: SelectionConfig = field(default_factory=SelectionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def may_keep_features(self) -> bool:
        """Whether features of images may be used in more than one micro-batch (`vision.*`)."""
        used_again = self.vision.encode == "step" or self.vision.cache != "none"
        return used_again and self.trainable.vision == "frozen"


def missing_model(path: str) -> str:
    """What a model directory lacks before it can be opened; empty if nothing, or if `path` may be a Hub id."""
    folder = Path(path)
    if is_adapter(path):
        base = base_of(path)
        return (fault := missing_model(base)) and f"the adapter's base {base!r}: {fault}"
    if folder.is_dir():
        return "" if (folder / "config.json").is_file() else "the directory has no config.json, so it is not a model"
    if folder.exists():
        return "this is a file; give the directory of the model"
    return "" if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) else "no such directory"
