"""The TRL provider of `bpo bench step`: DPOTrainer in its standard form, paused between steps by a callback."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from bpo.data.families import family_of
from bpo.job.launch import Ranks, pick_device
from bpo.model.trainable import lora_config
from bpo.tools.bench.case import StepCase, set_adapter
from bpo.tools.bench.meter import Meter
from bpo.tools.bench.workers import Command, Session

# More steps than a benchmark runs; the trainer is stopped from its callback.
_MANY_STEPS = 1_000_000


class _Stop(Exception):
    """Raised in a callback to leave the trainer's loop."""


def serve(case: StepCase, session: Session, provider: str) -> None:
    """Creates a DPOTrainer for the rows of the case and runs `train()`; each step waits for a command."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from trl import DPOTrainer

    dtype = getattr(torch, case.dtype)
    model = AutoModelForImageTextToText.from_pretrained(case.model, dtype=dtype)
    family = family_of(AutoConfig.from_pretrained(case.model))
    losses: list[torch.Tensor] = []

    class RecordingTrainer(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    trainer = RecordingTrainer(
        model=model,
        args=_arguments(case, use_liger_kernel=provider == "trl-liger"),
        train_dataset=_dataset(case),
        peft_config=lora_config(model, family, case.config().lora, case.model),
    )
    adapter = set_adapter(trainer.model, dtype)
    base = trainer.model.get_base_model()
    meter = Meter(base, family.language_module, family.vision_module, pick_device(Ranks()))
    logps: list[torch.Tensor] = []
    trainer.model.register_forward_hook(lambda module, args, output: logps.append(output.log_probs.detach()))

    trainer.add_callback(_on_command(case, session, meter, losses, logps))
    meter.release()
    session.ready(adapter=adapter)
    with contextlib.suppress(_Stop):
        trainer.train()


def _on_command(
    case: StepCase, session: Session, meter: Meter, losses: list[torch.Tensor], logps: list[torch.Tensor]
) -> Any:
    """A callback that measures each step; `losses` and `logps` receive the results of the step."""
    from transformers import TrainerCallback

    class OnCommand(TrainerCallback):
        """Sends the result of each step and waits for the next command."""

        def __init__(self) -> None:
            self.measuring = contextlib.ExitStack()
            self.result: dict[str, Any] = {}
            self.command = Command("step")

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            command = session.receive()
            if command.what == "stop":
                raise _Stop
            if command.what != "step":
                raise ValueError(f"TRL cannot precompute the reference for images; unsupported: {command.what!r}")
            losses.clear()
            logps.clear()
            self.result, self.command = {}, command
            self.measuring.enter_context(meter.measure(command.kind, self.result))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.measuring.close()
            self.result["loss"] = float(losses[0])
            if self.command.kind == "plain":
                self.result["pairs"] = _pairs(case, logps)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grad_norm" in logs:  # once per step, right after `on_step_end`
                if not self.command.keep_cache:
                    meter.release()
                session.answer({**self.result, "grad_norm": float(logs["grad_norm"])})

    return OnCommand()


def _arguments(case: StepCase, *, use_liger_kernel: bool) -> Any:
    """One batch of all rows per step with bpo's hyperparameters; other arguments have TRL's defaults."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(Path(case.workdir) / "trl"),
        per_device_train_batch_size=case.num_pairs,
        gradient_accumulation_steps=1,
        max_steps=_MANY_STEPS,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        beta=case.beta,
        max_length=case.max_length_tokens,
        max_grad_norm=1.0,
        bf16=case.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # required for bf16 on CPU
        gradient_checkpointing=case.gradient_checkpointing in ("full", "offload"),
        use_liger_kernel=use_liger_kernel,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _dataset(case: StepCase) -> Any:
    import datasets

    rows = [
        {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, "images": list(row.images)}
        for row in case.rows
    ]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def _pairs(case: StepCase, logps: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Summed log-probs of both completions, by pair; TRL's batch has all chosen, then all rejected completions.

    The first forward pass of a step is the policy's, the second the reference's.
    """
    policy, reference = (logp.double().sum(1).cpu().chunk(2) for logp in logps)
    return {
        row.label: {
            "chosen": float(policy[0][i]),
            "rejected": float(policy[1][i]),
            "reference_chosen": float(reference[0][i]),
            "reference_rejected": float(reference[1][i]),
        }
        for i, row in enumerate(case.rows)
    }
