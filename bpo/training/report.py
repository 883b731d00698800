"""Reports the steps of a training run: progress bar, metrics.jsonl, experiment trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from bpo.config.training import TrainConfig
from bpo.job.launch import Ranks
from bpo.losses.program import LossProgram
from bpo.training.flops import ModelFlops
from bpo.training.hardware import peak_flops
from bpo.training.metrics import MetricsWriter, step_metrics, step_rates
from bpo.training.trackers import Trackers

logger = logging.getLogger(__name__)


class StepReport:
    """Reports finished steps on rank 0.

    Args:
        done: Steps finished by earlier starts.
        total: Steps of the run.
        groups_per_epoch: Groups trained on per epoch.
        flops: Useful FLOPs of the model, for model_tflops_per_second and mfu.
        program: The loss.
        trackers: Also get the metrics.
        more: Gives further metrics, of the steps since its last call.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        device: torch.device,
        *,
        done: int,
        total: int,
        groups_per_epoch: int,
        flops: ModelFlops,
        program: LossProgram,
        trackers: Trackers | None = None,
        more: Callable[[], Mapping[str, float]] = dict,
    ):
        self.program, self.more = program, more
        self.config, self.total, self.groups_per_epoch, self.flops = config, total, groups_per_epoch, flops
        self.peak = peak_of_all(device, config.peak_tflops, ranks)
        # A new run keeps no evaluation of step 0 that an earlier one has left in the directory.
        start_step = done if config.resume else -1
        self._writer = MetricsWriter(
            Path(config.output_dir), enabled=ranks.is_main, start_step=start_step, trackers=trackers
        )
        self._progress = tqdm(total=total, initial=done, desc="training", disable=not ranks.is_main)

    def step(self, number: int, totals: list[float], seconds: float, lr: float, grad_norm: float) -> None:
        """Reports step `number`, counted from 1.

        Args:
            totals: Sums of `StepSums.flat` over all ranks.
            seconds: From the first forward pass to the end of the optimizer's step.
        """
        metrics = step_metrics(totals, self.program) | step_rates(totals, seconds, self.flops, self.peak)
        metrics |= {"lr": lr, "grad_norm": grad_norm}
        self._progress.update()
        if "loss" in metrics:
            shown = {"loss": f"{metrics['loss']:.4f}"}
            if "rewards/accuracies" in metrics:
                shown["acc"] = f"{metrics['rewards/accuracies']:.2f}"
            self._progress.set_postfix(shown)
        if number % self.config.log_every_steps == 0 or number == self.total:
            metrics |= self.more()
            metrics["epoch"] = round(number * self.config.groups_per_step / self.groups_per_epoch, 4)
            self._writer.write(number, metrics)

    def evaluation(self, number: int, metrics: dict[str, float]) -> None:
        """Reports the evaluation after `number` steps."""
        self._writer.write(number, metrics)
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") <= 2]  # not of splits
        logger.info("evaluation after step %d: %s", number, ", ".join(shown))

    def close(self) -> None:
        self._progress.close()
        self._writer.close()


def peak_of_all(device: torch.device, peak_tflops: float, ranks: Ranks) -> float | None:
    """FLOP/s of all devices together, for MFU; None, logged once, if the device's peak is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, peak_tflops)
    if peak is None:
        logger.info("mfu is not reported: the peak of `%s` is unknown; set train.peak_tflops", name)
        return None
    return peak * ranks.world_size
