"""Checkpoints of a DeepSpeed run: saves and restores each rank's ZeRO state; checks before a run is resumed.

ZeRO's partitions are read and written through DeepSpeed's tables of them, not through its checkpoint files: those are
pickles (loading them executes code), are named `latest` before they are complete, and fit one number of ranks only.
`shards` defines the format, `files` its durability, `save` the saving.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bpo.checkpoint.compatible import (
    DATA,
    PLAN,
    PLUGIN,
    REFERENCE,
    WEIGHTS,
    base_digest,
    base_files,
    check_content,
    check_options,
    content_digest,
)
from bpo.checkpoint.files import (
    CheckpointError,
    Hook,
    checkpoint_dirs,
    checkpoints_root,
    newest_valid_checkpoint,
    no_hook,
    step_of,
)
from bpo.checkpoint.save import CheckpointSaver
from bpo.checkpoint.shards import KINDS, MASTER, Fragment, Shard, ShardSet
from bpo.config.io import to_tree
from bpo.config.training import Config, TrainConfig
from bpo.engine import TrainingEngine
from bpo.job.collectives import JobRanks
from bpo.job.guard import RunGuard
from bpo.job.run_record import versions
from bpo.losses.plugin import load_plugin
from bpo.losses.program import LossProgram
from bpo.model.reference.store import other_reference
from bpo.training.online.steps import OnlineGroups
from bpo.training.plan import RunGroups

logger = logging.getLogger(__name__)
Found = tuple[Path, dict[str, Any]]


def check_settings(settings: dict[str, Any]) -> None:
    """Rejects DeepSpeed settings whose state cannot be saved, before any long work starts.

    Raises:
        ValueError: no ZeRO stage, weights or states on NVMe, or MiCS; names the key.
    """
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"train.ds_config: zero_optimization.stage is {zero.get('stage', 0)}; checkpoints are written for stages "
            "1, 2 and 3 (stage 1 costs no more than stage 0)"
        )
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise ValueError("train.ds_config: offload_optimizer.device nvme cannot be saved; use cpu")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise ValueError(
            "train.ds_config: offload_param.device nvme: DeepSpeed 0.19.8 stops in the second step (`Not enough "
            "buffers 0 for swapping 1`); use ds_configs/zero3_offload.json"
        )
    if zero.get("mics_shard_size", -1) > 0:
        raise ValueError("train.ds_config: mics_shard_size is not supported by checkpoints; remove it")


def find_resumable(config: Config, job: JobRanks) -> Found | None:
    """Returns a checkpoint compatible with this configuration, or None for a fresh start. Call on all ranks.

    Raises:
        CheckpointError: checkpoints exist but `train.resume` is off (a fresh start would mix with them), none of them
            is valid, or options that affect a step's result differ.
    """
    output_dir = Path(config.train.output_dir)
    if not config.train.resume:
        if job.gather(bool(checkpoint_dirs(output_dir)) if job.rank == 0 else False)[0]:
            raise CheckpointError(
                f"{output_dir} contains checkpoints of an earlier run; pass --resume or set another train.output_dir"
            )
        return None
    found = newest_valid_checkpoint(output_dir, job)
    if found is None:
        if job.rank == 0:
            logger.warning("--resume: no checkpoint in %s yet; starting at step 0", checkpoints_root(output_dir))
        return None
    check_options(found[1], to_tree(config), job.world_size, config.train.accept_changes, warn=job.rank == 0)
    return found


class RunDescription:
    """Writes the manifests of a run; checks that a checkpoint is of the same data, plan, base model and reference.

    Args:
        base, reference: Fingerprints (`run_fingerprint`) of `model.path` and of the reference.
    """

    def __init__(
        self,
        config: Config,
        groups: RunGroups,
        base: dict[str, str],
        reference: dict[str, str],
        ranks: int,
        program: LossProgram,
        online: OnlineGroups | None = None,
    ):
        self.config, self.steps, self.ranks, self.program, self.online = config, groups.steps, ranks, program, online
        self.base = base_files(base)
        self.fingerprints = {
            DATA: content_digest(groups.content()),
            WEIGHTS: base_digest(self.base),
            REFERENCE: content_digest(f"{name} {value}" for name, value in sorted(reference.items())),
            PLUGIN: load_plugin(config.loss.plugin),
        }
        self._loss_states: dict[str, Any] = {}

    def take_loss_states(self) -> None:
        """Keeps the states as they are now for `manifest`, which is written when later steps may have changed them."""
        self._loss_states = {name: copy.deepcopy(state.state_dict()) for name, state in self.program.states.items()}

    def plan_digest(self, done: int) -> str:
        """Digest of the order of groups in the first `done` steps; the same for any number of ranks."""
        return content_digest(f"{step.epoch} {step.groups}" for step in self.steps[:done])

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of the step of which the states were taken last, without its files."""
        return {
            "step": step,
            "world_size": self.ranks,
            "cursor": {
                "steps_done": step,
                "steps_planned": len(self.steps),
                "epoch": self.steps[step - 1].epoch,
                "groups_done": sum(len(planned.groups) for planned in self.steps[:step]),
            },
            "seeds": {"train.seed": self.config.train.seed},
            "fingerprints": {**self.fingerprints, PLAN: self.plan_digest(step)},
            "base": self.base,
            "loss_states": self._loss_states,
            "versions": versions(),
            "config": to_tree(self.config),
        }

    def check(self, manifest: dict[str, Any], *, warn: bool) -> None:
        """Raises CheckpointError if data, plan or base weights are not the checkpoint's; warns if versions differ."""
        accepted = self.config.train.accept_changes
        check_content(manifest, DATA, self.fingerprints[DATA], accepted, warn=warn)
        check_content(manifest, WEIGHTS, self.fingerprints[WEIGHTS], accepted, warn=warn)
        check_content(manifest, PLAN, self.plan_digest(manifest["step"]), accepted, warn=warn)
        check_content(manifest, PLUGIN, self.fingerprints[PLUGIN], accepted, warn=warn)
        if other_reference(self.config) or manifest["config"]["train"].get("reference_model"):
            check_content(manifest, REFERENCE, self.fingerprints[REFERENCE], accepted, warn=warn)
        changed = [f"{k} {v} -> {versions().get(k)}" for k, v in manifest["versions"].items() if versions().get(k) != v]
        if changed and warn:
            logger.warning(
                "versions differ from the checkpoint's: %s; losses may differ in rounding", ", ".join(changed)
            )


class Partition:
    """This rank's flat fp32 tensors under ZeRO 1, 2 or 3, and the parameter elements in each."""

    def __init__(self, engine: TrainingEngine):
        self.engine = engine
        self.zero = engine.optimizer
        self.adam: torch.optim.Optimizer = self.zero.optimizer
        named = {n: p for n, p in engine.policy.model.named_parameters() if p.requires_grad}
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in named.items()}
        self.flats = engine.master_weights
        self.copies = {f"{name}.{n}": flat for name, flats in engine.copies.items() for n, flat in enumerate(flats)}
        is_whole = not engine.is_partitioned
        self.fragments = self._of_stages_1_and_2(named) if is_whole else self._of_stage_3(named, engine.ranks.rank)

    def _of_stages_1_and_2(self, named: dict[str, torch.nn.Parameter]) -> list[Fragment]:
        """A group's parameters are concatenated and cut into equal parts, which may split a parameter."""
        group_of = {id(p): number for number, group in enumerate(self.zero.bit16_groups) for p in group}
        fragments = []
        for name, parameter in named.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = group_of[id(parameter)]
                fragments.append(self._fragment(name, parameter, low.start, low.numel, flat, high.start))
        return fragments

    def _of_stage_3(self, named: dict[str, torch.nn.Parameter], rank: int) -> list[Fragment]:
        """Each parameter is cut into equal parts, the last one padded."""
        fragments = []
        for name, parameter in named.items():
            flat, flat_start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            numel = min(count, parameter.ds_numel - rank * count)  # type: ignore[attr-defined]
            if numel > 0:
                fragments.append(self._fragment(name, parameter, rank * count, numel, flat, flat_start))
        return fragments

    def _fragment(self, name: str, parameter: torch.Tensor, start: int, numel: int, flat: int, at: int) -> Fragment:
        dtype = str(parameter.dtype).removeprefix("torch.")
        return Fragment(name, self.shapes[name], dtype, int(start), int(numel), int(flat), int(at))

    def shard(self) -> Shard:
        """Returns the live state, not a copy. Requires at least one step."""
        tensors: dict[str, torch.Tensor] = {}
        steps = set()
        for number, flat in enumerate(self.flats):
            state = self.adam.state[flat]
            steps.add(int(state["step"]))
            tensors |= {f"{MASTER}.{number}": flat.data, **{f"{k}.{number}": state[k] for k in KINDS if k != MASTER}}
        if len(steps) != 1:
            raise CheckpointError(f"the optimizer's groups have taken different numbers of steps: {sorted(steps)}")
        return Shard(self.fragments, steps.pop(), tensors | self.copies)

    @torch.no_grad()
    def restore(self, shards: ShardSet) -> None:
        """Restores master weights, moments and step, then the model's weights from the master weights, as a step does.

        Raises:
            CheckpointError: the checkpoint has other trained parameters than the model.
        """
        stored = shards.shapes()
        differing = sorted(n for n in stored.keys() | self.shapes.keys() if stored.get(n) != self.shapes.get(n))
        if differing:
            first = differing[0]
            raise CheckpointError(
                f"{shards.directory}: {len(differing)} trained parameters differ from this model's, such as {first}: "
                f"{stored.get(first, 'absent')} in the checkpoint, {self.shapes.get(first, 'absent')} in the model"
            )
        tensors: dict[str, torch.Tensor] = {}
        for number, flat in enumerate(self.flats):
            state: dict[str, Any] = {kind: torch.zeros_like(flat.data) for kind in KINDS if kind != MASTER}
            tensors |= {f"{MASTER}.{number}": flat.data, **{f"{kind}.{number}": state[kind] for kind in state}}
            self.adam.state[flat] = {"step": self._step_value(shards.optimizer_step, flat), **state}
        shards.fill(self.fragments, tensors | self.copies)
        self.engine.publish_master_weights()

    def _step_value(self, step: int, flat: torch.Tensor) -> Any:
        """The step in the optimizer's type: a tensor in torch (on the device if fused), an int in DeepSpeedCPUAdam."""
        if not isinstance(self.adam, (torch.optim.Adam, torch.optim.AdamW)):
            return step
        fused = any(group.get("fused") or group.get("capturable") for group in self.adam.param_groups)
        return torch.tensor(float(step), device=flat.device if fused else "cpu")


def write_reference(engine: TrainingEngine, path: Path, step: int, flats: Sequence[torch.Tensor]) -> None:
    """Writes this rank's part of other trained weights (`ShadowWeights.flats`) as a shard that `ShardSet` reads."""
    tensors = {f"{MASTER}.{number}": flat for number, flat in enumerate(flats)}
    Shard(Partition(engine).fragments, step, tensors).write(path)


def resume(engine: TrainingEngine, description: RunDescription, found: Found | None) -> int:
    """Loads weights and optimizer of a verified checkpoint, written by any number of ranks; returns the steps done.

    Raises:
        CheckpointError: data, plan, base weights or trained parameters differ from the checkpoint's, or it is not of an
            online run.
    """
    online = description.online
    if online is not None and online.reference is not None:
        online.reference.write = functools.partial(write_reference, engine)
    if found is None:
        if online is not None:
            online.start("")
        return 0
    directory, manifest = found
    description.check(manifest, warn=engine.ranks.is_main)
    shards = ShardSet(directory, [name for name in manifest["files"] if name.endswith(".safetensors")])
    if online is not None and not shards.state:
        raise CheckpointError(f"{directory} is not of a run with online.source; set another train.output_dir")
    Partition(engine).restore(shards)
    if online is not None:
        online.start(shards.state)
    for name, state in manifest.get("loss_states", {}).items():
        if name in description.program.states:  # another loss may have been accepted
            description.program.states[name].load_state_dict(state)
    engine.deepspeed.global_steps = int(manifest["step"])
    if engine.ranks.is_main:
        logger.info("continuing from %s: %d steps are done", directory, manifest["step"])
    return int(manifest["step"])


def build_saver(
    engine: TrainingEngine, options: TrainConfig, description: RunDescription, guard: RunGuard, at_stage: Hook = no_hook
) -> CheckpointSaver:
    """Saves the engine's state as set in `train.*`; publishes nothing after another job took over the directory."""
    online = description.online

    def take() -> Shard:
        description.take_loss_states()
        state = online.state() if online is not None and engine.ranks.is_main else ""
        return replace(Partition(engine).shard(), state=state)

    def describe(step: int) -> dict[str, Any]:
        if problem := guard.lost():
            raise CheckpointError(problem)
        if online is not None and (reference := online.reference):
            oldest = min(map(step_of, checkpoint_dirs(Path(options.output_dir))), default=0)
            reference.remove_stores(lambda moved_at: moved_at + reference.every <= oldest)
        return description.manifest(step)

    return CheckpointSaver(
        Path(options.output_dir),
        JobRanks(engine.ranks),
        take,
        describe,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        in_background=options.save_in_background,
        at_stage=at_stage,
        waiting=lambda: guard.phase("writing the checkpoint"),
    )
