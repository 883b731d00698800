"""Fills the store of an online run's current reference on a free device: `bpo refs follow RUN_DIR`.

The run publishes its reference (`online.publish_reference`) and reads what is stored before each of its own passes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bpo.checkpoint.shards import ShardSet
from bpo.config.io import load_config
from bpo.data.encode import load_encoder
from bpo.data.groups import GroupDataset, MeasuredGroup
from bpo.data.reference_keys import split_keys
from bpo.formats.files import read_groups
from bpo.job.exits import read_status
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.losses.program import HeadOutput, LossProgram
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers.install import choose_levers, install_levers
from bpo.model.load import load_base, resolve_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.reference.format import ReferenceStoreError, read_fingerprint
from bpo.model.reference.store import ReferenceStore, run_fingerprint, store_directory
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch, HeadRequest, PreferenceGroup
from bpo.training.measure import TrainingData
from bpo.training.online.reference import published_reference, store_of_reference, weights_folder
from bpo.training.reference_pass import groups_without_entries, score_groups

logger = logging.getLogger(__name__)

AT_ONCE = 32  # groups per shard
POLL_S = 2.0
LABEL = "refs-follow"  # sorted behind the run's own shards: of equal entries the run's is used


class Follower:
    """The model and the negatives of an online run, `run` being its `train.output_dir`."""

    ranks = Ranks()  # with policy, device, dtype and reference_logp: what `score_groups` uses of an engine

    def __init__(self, run: Path, device: torch.device):
        config = load_config(["--config", str(run / "config.yaml")], "bpo refs follow")
        self.run, self.config = run, replace(config, train=replace(config.train, output_dir=str(run)))
        model = resolve_model(config.model, device, for_training=True)
        self.device, self.dtype = device, model.dtype
        self._encoder = load_encoder(config, model.config)
        self._plan = LossProgram(config.loss, config.train.seed).plan
        self._initial = run_fingerprint(self.config, model, store_directory(self.config))
        loaded = load_base(model)
        prepare_trainable(loaded, self._encoder.family, config)
        install_levers(loaded, self._encoder.family, config, choose_levers(config, model))
        self.policy = PolicyModel(loaded).to(device).eval()
        self._published: dict[str, Any] | None = None
        self._measured: dict[PreferenceGroup, MeasuredGroup | None] = {}  # None: it cannot be used

    @torch.no_grad()
    def reference_logp(self, batch: GroupBatch) -> HeadOutput:
        """As `TrainingEngine.reference_logp`."""
        with packed_layout(batch.layout):
            return HeadOutput(*self.policy(**model_inputs(batch), loss_inputs=batch.loss_inputs, request=HeadRequest()))

    def fill(self, published: dict[str, Any]) -> bool:
        """Computes up to `AT_ONCE` groups that the store of the published weights lacks; False if it lacks none.

        Raises:
            FileNotFoundError, ReferenceStoreError: the run has removed the weights or the store by now; the latter also
                if the store is of another model or setting.
            ValueError: the weights are not those that config.yaml trains.
        """
        if published != self._published:
            self._load(published)
        negatives = list(self._negatives())
        new = [group for group in negatives if group not in self._measured][:AT_ONCE]
        results = self._dataset(new).measure_all(range(len(new)), self.config.data.num_workers if new else 0)
        self._measured |= {g: r if isinstance(r, MeasuredGroup) else None for g, r in zip(new, results, strict=True)}
        self._measured = {group: self._measured[group] for group in negatives if group in self._measured}
        usable = {group: found for group, found in self._measured.items() if found is not None}
        data = TrainingData(self._dataset(list(usable)), tuple(range(len(usable))), tuple(usable.values()))
        self._store.reload()
        missing = groups_without_entries(self._store, data, lambda group: split_keys(group.cell_keys))[:AT_ONCE]
        if missing:
            engine: Any = self
            _, lost, _ = score_groups(self.config, engine, data, self._store, missing, None, quiet=True)
            self._store.close()
            self._measured |= dict.fromkeys(list(usable)[group.index] for group in lost)
        return bool(new or missing)

    def _load(self, published: dict[str, Any]) -> None:
        step = published["step"]
        directory, fingerprint = store_of_reference(self.config, self._initial, step)
        read_fingerprint(directory)  # raises if there is none: only the run makes stores
        self._store = ReferenceStore(directory, fingerprint, label=LABEL)
        state = dict(ShardSet(weights_folder(self.run, step), published["files"]).parameters())
        model = self.policy.model
        if state.keys() != {name for name, parameter in model.named_parameters() if parameter.requires_grad}:
            raise ValueError(f"{self.run}: published weights are not those that config.yaml trains; start again")
        model.load_state_dict(state, strict=False)
        self._published = published
        logger.info("%s: following the reference of step %d", self.run, step)

    def _negatives(self) -> Iterator[PreferenceGroup]:
        """The latest `online.buffer_size`, newest first."""
        room = self.config.online.buffer_size
        for path in sorted((self.run / "online").glob("window-*[0-9].jsonl"), reverse=True):
            groups = read_groups(path)[::-1][:room]
            yield from groups
            room -= len(groups)

    def _dataset(self, groups: Sequence[PreferenceGroup]) -> GroupDataset:
        """As `NegativeMaker.dataset`."""
        max_words, types = self.config.data.max_completion_words, self.config.train.completion_types
        return GroupDataset(groups, self._encoder, max_words=max_words, types=types, plan=self._plan)


def follow(run: Path, device: torch.device, stop: StopRequest) -> None:
    """Fills stores until the run has ended or a signal comes; waits for the first published reference."""
    follower, is_waiting = None, False
    while not stop.received and read_status(run).get("state") != "ended":
        published = published_reference(run)
        if published is None and not is_waiting:
            logger.info("%s: waiting for a reference; the run needs online.publish_reference: true", run)
            is_waiting = True
        try:
            if published is not None:
                follower = follower or Follower(run, device)
            is_busy = follower is not None and published is not None and follower.fill(published)
        except (FileNotFoundError, ReferenceStoreError):
            if published_reference(run) == published:
                raise
            is_busy = True  # the run has moved on meanwhile
        if not is_busy:
            time.sleep(POLL_S)
