"""Preference training: `deepspeed bpo/train.py --config FILE [--train.lr 1e-5 ...]`.

Reads the groups, computes the reference once, and trains with DeepSpeed. torchrun, srun and plain python start it too.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # `deepspeed bpo/train.py` puts bpo/ first: its modules must not pass for top-level ones

import torch
from tqdm import tqdm

from bpo import engine, losses
from bpo.checkpoint import partition
from bpo.checkpoint.files import CheckpointError, clean_leftovers
from bpo.checkpoint.save import CheckpointSaver, SaveFailedError
from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.data.encode import load_encoder
from bpo.data.schedule import PlannedStep
from bpo.job import collectives
from bpo.job.compile_locks import named_compile_locks
from bpo.job.guard import RankLostError, RunGuard, write_status
from bpo.job.launch import Ranks, own_arguments, pick_device, ranks_from_environment, setup_logging
from bpo.job.lock import NoProgressError, RunLockError
from bpo.job.run_record import write_run_record
from bpo.job.signals import (
    EXIT_CANNOT_SAVE,
    EXIT_INTERRUPTED,
    EXIT_NO_PROGRESS,
    EXIT_RANK_LOST,
    Interrupted,
    StopRequest,
)
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import choose_attention, load_model, resolve_dtype
from bpo.model.policy import PolicyModel
from bpo.model.reference.store import ReferenceStore
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from bpo.training.batches import StepBatches, training_batches
from bpo.training.checks import (
    FirstStepError,
    NonFiniteError,
    check_finite,
    check_first_step,
    expected_loss,
    seed_micro_batch,
)
from bpo.training.flops import ModelFlops, model_flops
from bpo.training.hardware import peak_flops
from bpo.training.measure import TrainingData, measure_groups
from bpo.training.metrics import MetricsWriter, StepSums, step_metrics, step_rates
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store

logger = logging.getLogger(__name__)

# What ends a run with a message that says what to do, and the code that tells a scheduler whether to start it again.
EXIT_CODES: dict[type[Exception], int] = {
    SaveFailedError: EXIT_CANNOT_SAVE,
    RankLostError: EXIT_RANK_LOST,
    NoProgressError: EXIT_NO_PROGRESS,
    RunLockError: 1,
    CheckpointError: 1,
    FirstStepError: 1,
    NonFiniteError: 1,
    ValueError: 1,
}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def run_step(
    trainer: engine.TrainingEngine, batches: StepBatches | list[GroupBatch], config: Config, num_pairs: int, step: int
) -> StepSums:
    """Forward and backward of one optimizer step on this rank: loss = mean over all pairs of the global batch."""
    sums = StepSums.zero()
    for k, host_batch in enumerate(batches):
        batch = host_batch.to(trainer.device, trainer.dtype)  # no copy where the loader has made it
        seed_micro_batch(config.train.seed, step, k, trainer.ranks.rank)
        assert batch.reference_logp_N is not None
        with packed_layout(batch.layout):
            constants = {
                "reference_logp_N": batch.reference_logp_N,
                "completion_of_token_N": batch.completion_of_token_N,
                "completion_starts_C1": batch.completion_starts_C1,
                "num_completions": batch.num_completions,
                "pairs_P2": batch.pairs_P2,
            }
            inputs, output = losses.with_loss(functools.partial(trainer.forward, batch), constants, config.loss)
            nll_P = losses.chosen_nll(inputs)
            loss_P = output.loss_P + config.loss.chosen_nll_weight * nll_P
            weight_P = batch.pair_weight_P
            trainer.backward((loss_P * weight_P).sum() / num_pairs, is_last=k == len(batches) - 1)
        sums.add(loss_P, output, nll_P, inputs, weight_P, batch)
        if step == 0:
            sums.expected_first_loss += expected_loss(inputs, config, weight_P)
    return sums


def peak_of_all(device: torch.device, peak_tflops: float, ranks: Ranks) -> float | None:
    """FLOP/s of all devices together, for MFU; None where the device's peak is not known, said once."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, peak_tflops)
    if peak is None:
        logger.info("mfu is left out: the peak of `%s` is not known; train.peak_tflops gives it", name)
        return None
    return peak * ranks.world_size


@dataclasses.dataclass
class Prepared:
    """What the loop needs, after everything that happens once."""

    data: TrainingData
    steps: list[PlannedStep]
    trainer: engine.TrainingEngine
    store: ReferenceStore
    saver: CheckpointSaver
    done: int
    flops: ModelFlops


def prepare(config: Config, ranks: Ranks, guard: RunGuard, stop: StopRequest | None) -> Prepared:
    """Finds the checkpoint, measures, plans, loads, computes the reference, restores."""
    output_dir = Path(config.train.output_dir)
    dtype = resolve_dtype(config.model)
    choose_attention(config.model, pick_device(ranks))  # before hours of measuring: refuses what cannot run
    found = partition.find_resumable(config, collectives.JobRanks(ranks))
    guard.count_restart(found[1]["step"] if found else 0)
    if ranks.is_main:
        write_run_record(config, output_dir)
    encoder = load_encoder(config)
    with guard.phase("measuring the groups"):
        data = measure_groups(config, encoder, ranks, collectives.gather_from_ranks, stop)
    steps = plan_training(config, data, ranks)
    settings = engine.deepspeed_config(config, dtype, max(len(s.micro_batches[0]) for s in steps))
    with guard.phase("loading the model"), engine.partitioned_loading(settings):
        model = load_model(config.model, pick_device(ranks), for_training=True)
    prepare_trainable(model, encoder.family, config)
    flops = model_flops(model, encoder.family)
    with guard.phase("starting DeepSpeed"):
        trainer = engine.TrainingEngine(PolicyModel(model), encoder.family, config, settings, ranks)
    trainer.on_forward = guard.in_forward
    guard.watchdog.beat("the reference pass")
    with guard.progress_if_interrupted():
        store = fill_reference_store(config, trainer, data, stop)
    guard.after_reference()
    description = partition.RunDescription(config, data, steps, store.fingerprint, ranks.world_size)
    done = 0
    if found:
        description.check(found[1], aloud=ranks.is_main)
        with guard.phase("loading the checkpoint"):
            done = partition.resume(trainer, found)
    saver = partition.saver_of(trainer, config.train, description, guard)
    return Prepared(data, steps, trainer, store, saver, done, flops)


@named_compile_locks()
def train(config: Config, ranks: Ranks, stop: StopRequest | None = None) -> bool:
    """The whole run, inside a process group that `engine.init_distributed` started; False where `stop` cut it short.

    Raises:
        Interrupted: `stop` came before the first step; what was measured and computed of the reference is kept.
    """
    dtype = resolve_dtype(config.model)
    # What can be refused is refused before the hours of measuring, loading and the reference pass.
    losses.check_loss(config.loss)
    partition.check_settings(engine.deepspeed_config(config, dtype, 1))
    with RunGuard(config.train, ranks, clean_leftovers) as guard:
        return run_steps(config, prepare(config, ranks, guard, stop), guard, stop)


def run_steps(config: Config, run: Prepared, guard: RunGuard, stop: StopRequest | None) -> bool:
    """Every step that is not done yet; False where `stop` cut it short."""
    trainer, steps, ranks = run.trainer, run.steps, run.trainer.ranks
    peak = peak_of_all(trainer.device, config.train.peak_tflops, ranks)
    output_dir = Path(config.train.output_dir)
    writer = MetricsWriter(output_dir, enabled=ranks.is_main, tensorboard=config.train.tensorboard, start_step=run.done)
    batches = training_batches(config, run.data, steps[run.done :], run.store, trainer)
    number = run.done
    progress = tqdm(total=len(steps), initial=number, desc="training", disable=not ranks.is_main)
    for step in steps[run.done :]:
        guard.at_step(number)
        started = time.perf_counter()
        sums = run_step(trainer, next(batches), config, run.data.num_pairs(step.groups), step.index)
        flat = trainer.sum_over_ranks(sums.flat())
        check_finite(sums, step, flat, trainer)
        if step.index == 0:
            check_first_step(config, flat, sums, trainer, trainer.dtype)
        lr_factor = engine.learning_rate_factor(step.index, len(steps), config.train)
        grad_norm = trainer.step(lr_factor)
        check_finite(sums, step, [grad_norm], trainer)
        seconds = time.perf_counter() - started
        metrics = step_metrics(flat) | step_rates(flat, seconds, run.flops, peak)
        metrics |= {"lr": config.train.lr * lr_factor, "grad_norm": grad_norm}
        progress.update()
        progress.set_postfix(loss=f"{metrics['loss']:.4f}", acc=f"{metrics['rewards/accuracies']:.2f}")
        number = step.index + 1
        if number % config.train.log_every_steps == 0 or number == len(steps):
            metrics["epoch"] = round(number * config.train.groups_per_step / len(run.data.usable), 4)
            writer.write(number, metrics)
        every = config.train.save_every_steps
        due = number == len(steps) or bool(every and number % every == 0)
        if run.saver.boundary(number, due=due, stop=stop is not None and stop.received):
            break
    run.saver.finish(number)
    progress.close()
    writer.close()
    return number == len(steps)


def main(argv: list[str] | None = None) -> None:
    ranks = ranks_from_environment()
    setup_logging(ranks)
    try:
        config = load_config(own_arguments(sys.argv[1:] if argv is None else argv), "bpo/train.py", __doc__ or "")
    except ValueError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(config.train.seed)
    code, message = 0, "finished"
    try:
        engine.init_distributed(ranks)
        if not train(config, ranks, StopRequest()):
            code, message = EXIT_INTERRUPTED, "interrupted; a checkpoint is written, `--resume` continues"
    except Interrupted as reason:
        code, message = EXIT_INTERRUPTED, f"{reason}; `--resume` continues"
    except Exception as error:
        _leave(error, config, ranks)
    if ranks.is_main:
        write_status(Path(config.train.output_dir), code, message)
    collectives.shut_down()
    if code:
        logger.warning("%s", message)
        sys.exit(code)


def _leave(error: Exception, config: Config, ranks: Ranks) -> None:
    """Ends the process with the code and the message of an error that says what to do; raises any other."""
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), None)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        code = EXIT_CANNOT_SAVE
    if code is None:
        raise error
    logger.error("%s", error)  # a traceback a rank would hide it
    if ranks.is_main and not isinstance(error, RunLockError):
        write_status(Path(config.train.output_dir), code, str(error))
    if code == EXIT_RANK_LOST:
        sys.stderr.flush()
        os._exit(code)  # libraries would wait at exit for ranks that are gone
    sys.exit(code)


if __name__ == "__main__":
    main()
