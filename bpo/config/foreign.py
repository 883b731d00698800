"""Names that TRL, LLaMA-Factory and ms-swift give to options, and what they are here."""

from __future__ import annotations

_MICRO_BATCH = "`train.max_micro_batch_tokens`, the tokens per forward pass and rank"
_STEP = "`train.groups_per_step`, the groups per optimizer step over all ranks"
_LENGTH = "`data.max_length_tokens`, the tokens of prompt and completion together"
_DTYPE = "`model.dtype`: bfloat16, float16 or float32"
_ATTENTION = "`model.attention`: auto, flash, varlen, flex or sdpa"
_FREEZE = "`trainable.{}`: frozen or full"
_TERM = "`loss.terms`, a term with"
_ALWAYS = "nothing: {}"
_HELD_OUT = "`train.held_out_groups`, a share or a number of groups"
_EVALUATION = "`train.evaluate_every_steps`, the steps between evaluations; 0 is off"

# Lower case, with underscores. A plain key, or a phrase with keys in backquotes.
FOREIGN = {
    # model
    "model_name_or_path": "model.path",
    "model_id_or_path": "model.path",
    "model_type": _ALWAYS.format("the family is read from the model's config.json; the model is `model.path`"),
    "template": _ALWAYS.format("the chat template is that of the processor in `model.path`"),
    "torch_dtype": _DTYPE,
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "pure_bf16": _DTYPE,
    "attn_impl": _ATTENTION,
    "attn_implementation": _ATTENTION,
    "flash_attn": _ATTENTION,
    "use_remote_code": "model.trust_remote_code",
    "activation_checkpointing": "model.gradient_checkpointing",
    "vit_gradient_checkpointing": "model.gradient_checkpointing",
    # data
    "dataset": "data.groups",
    "dataset_name": "data.groups",
    "train_file": "data.groups",
    "data_path": "data.groups",
    "dataset_dir": "`data.groups`, the path of the file itself",
    "media_dir": "data.image_root",
    "image_folder": "data.image_root",
    "image_max_pixels": "data.max_pixels",
    "image_min_pixels": "data.min_pixels",
    "image_aspect_ratio": "data.image_aspect",
    "default_system": "data.system_prompt",
    "cutoff_len": _LENGTH,
    "max_length": _LENGTH,
    "model_max_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_completion_length": _LENGTH,
    "max_target_length": _LENGTH,
    "preprocessing_num_workers": "data.num_workers",
    "dataset_num_proc": "data.num_workers",
    "dataloader_num_workers": "data.num_workers",
    "dataloader_prefetch_factor": "data.prefetch_factor",
    # what is trained
    "finetuning_type": "`trainable.language`: lora, full or frozen",
    "train_type": "`trainable.language`: lora, full or frozen",
    "tuner_type": "`trainable.language`: lora, full or frozen",
    "use_peft": "`trainable.language`: lora, full or frozen",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target",
    "lora_target_modules": "lora.target",
    "target_modules": "lora.target",
    "freeze_vision_tower": _FREEZE.format("vision"),
    "freeze_vit": _FREEZE.format("vision"),
    "freeze_multi_modal_projector": _FREEZE.format("projector"),
    "freeze_aligner": _FREEZE.format("projector"),
    "freeze_mm_mlp_adapter": _FREEZE.format("projector"),
    "freeze_language_model": "`trainable.language`: lora, full or frozen",
    "freeze_llm": "`trainable.language`: lora, full or frozen",
    "aligner_lr": "train.projector_lr",
    "mm_projector_lr": "train.projector_lr",
    # loss
    "rlhf_type": "`loss.type`: sigmoid is DPO",
    "loss_type": "loss.type",
    "pref_loss": "loss.type",
    "stage": _ALWAYS.format("every run is preference training, with the loss `loss.type`"),
    "pref_beta": "loss.beta",
    "dpo_beta": "loss.beta",
    "pref_ftx": "loss.chosen_nll_weight",
    "rpo_alpha": "loss.chosen_nll_weight",
    "dpo_label_smoothing": "loss.label_smoothing",
    "loss_weights": "`loss.terms`, a list of terms with a weight each",
    "ld_alpha": f"{_TERM} ld_alpha",
    "use_weighting": f"{_TERM} weighting: wpo",
    "f_divergence_type": f"{_TERM} divergence",
    "f_alpha_divergence_coef": f"{_TERM} divergence_alpha, which is 1 minus it",
    "discopop_tau": "`loss.options`, with loss.type discopop: tau",
    "simpo_gamma": "`loss.options`, with loss.type simpo: gamma",
    "cpo_alpha": "`loss.chosen_nll_weight`, with loss.type cpo",
    "orpo_alpha": "`loss.terms`, a term of type orpo with that weight and one of type nll",
    "sync_ref_model": _ALWAYS.format("the reference is `model.path` before training"),
    "ref_model": _ALWAYS.format("the reference is `model.path` before training"),
    "ref_model_name_or_path": _ALWAYS.format("the reference is `model.path` before training"),
    "precompute_ref_log_probs": _ALWAYS.format("they are always computed once, and kept in `train.reference_dir`"),
    # optimisation
    "learning_rate": "train.lr",
    "vit_lr": _ALWAYS.format("a trained vision tower has the learning rate `train.lr`"),
    "lr_scheduler_type": "train.lr_schedule",
    "warmup_steps": "`train.warmup_ratio`, a fraction of the steps",
    "num_train_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "per_device_train_batch_size": f"{_MICRO_BATCH}, and {_STEP}",
    "train_batch_size": _STEP,
    "gradient_accumulation_steps": f"{_STEP}; micro-batches follow from `train.max_micro_batch_tokens`",
    "adam_epsilon": "train.adam_eps",
    "data_seed": "train.seed",
    "deepspeed": "train.ds_config",
    "deepspeed_config": "train.ds_config",
    # output
    "overwrite_output_dir": _ALWAYS.format("choose another `train.output_dir`, or continue with `train.resume`"),
    "save_steps": "train.save_every_steps",
    "save_total_limit": "train.keep_last",
    "save_strategy": "train.save_every_steps",
    "logging_steps": "train.log_every_steps",
    "resume_from_checkpoint": "`train.resume`, true or false",
    "report_to": "`tracking.to`, a list of wandb, mlflow and trackio; TensorBoard is `train.tensorboard`",
    "wandb_project": "tracking.project",
    "ddp_timeout": "train.hang_timeout_seconds",
    "val_size": _HELD_OUT,
    "split_dataset_ratio": _HELD_OUT,
    "do_eval": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "eval_steps": "train.evaluate_every_steps",
    "evaluation_strategy": _EVALUATION,
    "per_device_eval_batch_size": "`evaluation.batch_size`, the answers generated per batch",
    "metric_for_best_model": "train.keep_best",
    "load_best_model_at_end": "`train.keep_best`, a metric; checkpoints/best then names the checkpoint",
    "greater_is_better": _ALWAYS.format("the metric named in `train.keep_best` has a direction of its own"),
    "do_train": _ALWAYS.format("bpo train trains"),
    "plot_loss": _ALWAYS.format("metrics.jsonl in `train.output_dir` has the curves"),
    "logging_dir": _ALWAYS.format("TensorBoard's files are in `train.output_dir`"),
    "max_samples": _ALWAYS.format("all groups of `data.groups` are used; `train.max_steps` ends earlier"),
    "overwrite_cache": _ALWAYS.format("cached lengths of changed data are measured again; see `data.keep_lengths`"),
    "optim": _ALWAYS.format("the optimizer is AdamW, with the options that begin with train.adam_"),
    "eval_dataset": "`train.held_out_groups`, groups of the same file; benchmarks are `evaluation.suite`",
    "export_dir": "export.output",
}


def translation(leaf: str) -> str:
    """What a foreign name is here, as the end of a message; empty if it is not known."""
    meaning = FOREIGN.get(leaf.lower().replace("-", "_"), "")
    return f"; here it is {meaning if ' ' in meaning else f'`{meaning}`'}" if meaning else ""
