"""Preference training: `deepspeed bpo/train.py --config FILE [--train.lr 1e-5 ...]`.

Reads the groups, computes reference log-probs once, trains with DeepSpeed. torchrun, srun and plain python work too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        sys.path.pop(0)  # `deepspeed bpo/train.py` puts bpo/ first: its modules must not shadow top-level ones
    from bpo.job.signals import StopRequest

    _stop = StopRequest()  # before the imports, which take seconds

import torch

from bpo import engine
from bpo.checkpoint import partition
from bpo.checkpoint.files import clean_leftovers
from bpo.checkpoint.save import CheckpointSaver
from bpo.config.io import load_config, train_inputs
from bpo.config.training import Config
from bpo.data.encode import load_encoder
from bpo.data.families import Family
from bpo.job import collectives
from bpo.job.compile_locks import named_compile_locks
from bpo.job.exits import Interrupted, process_end
from bpo.job.guard import RunGuard
from bpo.job.launch import Ranks, own_arguments, pick_device, ranks_from_environment, setup_logging
from bpo.job.run_record import write_run_record
from bpo.job.signals import StopRequest
from bpo.losses.program import LossProgram, check_loss
from bpo.model.adapter import check_continued
from bpo.model.levers.install import choose_levers, install_levers
from bpo.model.levers.quantized import check_stage
from bpo.model.load import ResolvedModel, load_base, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.prompt_embedding import check_prompt_embedding
from bpo.model.reference.store import ReferenceStore, other_reference
from bpo.model.trainable import prepare_trainable
from bpo.training.agreement import check_agreement, facts_of_plan, facts_of_questions, facts_of_start
from bpo.training.batches import training_batches
from bpo.training.checks import check_finite, check_first_step, check_reference, check_weights
from bpo.training.embeddings import PromptEmbeddings, fill_embedding_store
from bpo.training.evaluation import Evaluations
from bpo.training.evaluation_plan import plan_evaluation
from bpo.training.extrapolation import InitialPolicy, check_extrapolation
from bpo.training.features import use_step_features
from bpo.training.flops import ModelFlops, model_flops
from bpo.training.held_out import HeldOutLoss
from bpo.training.metrics import num_lost
from bpo.training.online.prompts import check_online
from bpo.training.online.steps import OnlineGroups
from bpo.training.plan import RunGroups, plan_groups
from bpo.training.quantization_gap import report_quantization_gap
from bpo.training.reference_pass import fill_reference_store, model_description
from bpo.training.report import StepReport
from bpo.training.step import run_step
from bpo.training.trackers import Trackers, open_trackers


@dataclasses.dataclass
class Prepared:
    """Inputs of the training loop, after all one-time set-up."""

    groups: RunGroups
    trainer: engine.TrainingEngine
    store: ReferenceStore | None
    embeddings: PromptEmbeddings | None
    initial: InitialPolicy | None
    online: OnlineGroups | None
    saver: CheckpointSaver
    done: int
    flops: ModelFlops
    trackers: Trackers
    evaluations: Evaluations


def load_policy(
    config: Config, resolved: ResolvedModel, family: Family, settings: dict[str, Any], guard: RunGuard, *, is_new: bool
) -> Any:
    """The model to train, frozen and adapted, with its levers; a new run compares quantised with original weights."""
    with guard.phase("loading the model"), engine.partitioned_loading(settings):
        model = load_base(resolved, keep_original=is_new)
    prepare_trainable(model, family, config)
    install_levers(model, family, config, choose_levers(config, resolved))
    return model


def prepare(
    config: Config, resolved: ResolvedModel, ranks: Ranks, guard: RunGuard, stop: StopRequest | None
) -> Prepared | None:
    """Finds the checkpoint, measures and plans the groups, loads the model, fills the reference store, restores.

    None if that is all (`train.reference_only`): no step is taken, and no checkpoint read.
    """
    job = collectives.JobRanks(ranks)
    program = LossProgram(config.loss, config.train.seed)
    check_reference(config, program)
    check_extrapolation(config, program, resolved.config)
    encoder = load_encoder(config, resolved.config)
    if ranks.world_size > 1:
        check_agreement(facts_of_start(config, resolved, encoder), job)
    found = partition.find_resumable(config, job)
    step = found[1]["step"] if found else 0
    guard.count_restart(step)
    if ranks.is_main:
        write_run_record(config, Path(config.train.output_dir))
    # Before the hours of measuring and the reference pass: a tracker may lack its library, its key or its server.
    trackers = open_trackers(config, enabled=ranks.is_main and not config.train.reference_only, start_step=step)
    with guard.phase("reading the benchmarks"):
        plan = plan_evaluation(config, program)
        check_agreement(facts_of_questions(plan.benchmarks if plan else ()), job)
    with guard.phase("measuring the groups"):
        groups = plan_groups(config, encoder, ranks, stop, continuing=found is not None)
    program.plan_steps(len(groups.steps))
    check_agreement(facts_of_plan(groups.steps), job)
    most = max(len(step.micro_batches[0]) for step in groups.steps)
    settings = engine.deepspeed_config(config.train, resolved.dtype, most)
    model = load_policy(config, resolved, encoder.family, settings, guard, is_new=found is None)
    flops = model_flops(model, encoder.family)
    with guard.phase("starting DeepSpeed"):
        trainer = engine.TrainingEngine(PolicyModel(model), encoder.family, config, settings, ranks, program)
    check_weights(trainer.policy.model, config.model.path, ranks.rank)
    trainer.on_forward = guard.in_forward
    use_step_features(config, resolved, trainer, encoder.family, guard.closing)
    report_quantization_gap(config, trainer, groups)
    guard.watchdog.beat("the reference pass")
    with guard.progress_if_interrupted():
        prepared = (config, resolved, trainer, groups.measured, stop)
        store = fill_reference_store(*prepared) if program.needs_reference else None
        if config.train.reference_only:
            return None
        embeddings = fill_embedding_store(*prepared) if program.needs_similarity else None
    guard.after_reference()
    initial = InitialPolicy(trainer) if program.extrapolation else None  # before a checkpoint is loaded
    reference = model_description(config, resolved) if store is None else store.fingerprint
    base = model_description(config, resolved) if other_reference(config) else reference
    online = None
    if groups.prompts is not None:
        online = OnlineGroups(config, trainer, encoder, groups.prompts, groups.steps, base, guard, stop)
    description = partition.RunDescription(config, groups, base, reference, ranks.world_size, program, online)
    with guard.phase("loading the checkpoint") if found else contextlib.nullcontext():
        done = partition.resume(trainer, description, found)
    saver = partition.build_saver(trainer, config.train, description, guard)
    loss = HeldOutLoss(config, groups.held_out, trainer, store, embeddings, initial) if groups.held_out else None
    evaluations = Evaluations(config, plan, trainer, encoder, loss, guard, stop, done=done, total=len(groups.steps))
    return Prepared(groups, trainer, store, embeddings, initial, online, saver, done, flops, trackers, evaluations)


@named_compile_locks()
def train(config: Config, ranks: Ranks, stop: StopRequest | None = None) -> bool:
    """Runs training in the process group started by `engine.init_distributed`; False if `stop` cut it short.

    Raises:
        Interrupted: `stop` came before the first step; measured lengths and reference log-probs are kept.
    """
    # Validate before the hours of measuring, loading and the reference pass.
    resolved = resolve_model(config.model, pick_device(ranks), for_training=True)
    settings = engine.deepspeed_config(config.train, resolved.dtype, 1)
    partition.check_settings(settings)
    check_stage(config, settings)
    choose_levers(config, resolved)
    if resolved.adapter:
        check_continued(config, resolved.adapter)
    with RunGuard(config.train, ranks, clean_leftovers) as guard, guard.closing:
        prepared = prepare(config, resolved, ranks, guard, stop)
        return prepared is None or run_steps(config, prepared, guard, stop)


def run_steps(config: Config, run: Prepared, guard: RunGuard, stop: StopRequest | None) -> bool:
    """Runs the remaining steps; returns False if `stop` cut the run short."""
    trainer, todo, total, number = run.trainer, run.groups.steps[run.done :], len(run.groups.steps), run.done
    progress = {"done": run.done, "total": total, "groups_per_epoch": run.groups.num_per_epoch}
    report = StepReport(
        config.train,
        trainer.ranks,
        trainer.device,
        flops=run.flops,
        program=trainer.program,
        trackers=run.trackers,
        more=dict if run.online is None else run.online.metrics,
        **progress,
    )
    evaluations, saver = run.evaluations, run.saver
    if evaluations.at(number, report, saver.best):
        saver.mark_best(number)
    given = training_batches(config.data, run.groups.data, todo, run.store, trainer, plan=run.groups.steps)
    batches = given if run.online is None else run.online.batches(todo)
    for step in todo if not evaluations.stopped else ():
        guard.at_step(number)
        try:
            own = next(batches)
        except Interrupted:  # while the groups of the next steps were being made
            if number == 0:
                raise
            saver.boundary(number, due=True, stop=True)
            break
        started = time.perf_counter()
        sums = run_step(trainer, own, config, own.num_pairs, step.index, run.embeddings, run.initial)
        lr_factor = engine.learning_rate_factor(step.index, total, config.train)
        # Nothing is read before the optimizer's step. A check that fails ends the run without another checkpoint.
        totals, grad_norm = trainer.read_step(sums.on_device(), trainer.step(lr_factor))
        if step.index == 0 or not math.isfinite(sum(totals)):
            sums.flat()  # reads what the checks report
        check_finite(sums, step, totals, trainer)
        if num_lost(totals):
            lost = collectives.gather_from_ranks([dataclasses.asdict(group) for group in sums.lost])
            own.lost.report(lost, is_main=trainer.ranks.is_main)
        if step.index == 0:
            check_first_step(config, totals, sums, trainer)
        check_finite(sums, step, [grad_norm], trainer)
        seconds, number = time.perf_counter() - started, step.index + 1
        if run.online is not None:
            run.online.after_step(number)
        report.step(number, totals, seconds, config.train.lr * lr_factor, grad_norm)
        best = evaluations.at(number, report, saver.best)
        due = number == total or number % (config.train.save_every_steps or total) == 0
        if saver.boundary(number, due=due, stop=stop is not None and stop.received, best=best):
            break
    saver.finish(number)
    report.close()
    return number == total and not evaluations.stopped


def main(argv: list[str] | None, stop: StopRequest) -> None:
    own = own_arguments(sys.argv[1:] if argv is None else argv)
    try:
        ranks = ranks_from_environment()
        setup_logging(ranks)
        config = load_config(own, "bpo/train.py", __doc__ or "", train_inputs)
        check_online(config)
        check_loss(config.loss)  # before DeepSpeed compiles anything
        check_prompt_embedding(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(config.train.seed)
    with process_end(Path(config.train.output_dir), is_main=ranks.is_main, leave_group=collectives.shut_down):
        engine.init_distributed(ranks, stop)
        if not train(config, ranks, stop):
            raise Interrupted("interrupted; a checkpoint was written")


if __name__ == "__main__":
    main(None, _stop)
