"""The reference of an online run: weights that follow the policy, and a store of log-probs for each of their states.

    REFERENCE_DIR                       of the policy before its first step: the store of any run of the model
    OUTPUT/online/reference-00000108    of the weights copied after step 108; the weights themselves, if they are
                                        published, are in its folder `weights`, one file per rank
    OUTPUT/online/reference.json        names the published weights: written when all of them are there

A store stays until no checkpoint could need it: a continued run reads what the killed one had computed. `bpo refs
follow` adds entries of the published weights while the run trains.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpo.config.training import Config
from bpo.engine import TrainingEngine
from bpo.job.collectives import from_rank_0, gather_from_ranks
from bpo.job.durable import sync_directory, write_durably
from bpo.job.signals import StopRequest
from bpo.model.reference.store import ReferenceStore, open_or_create, store_directory
from bpo.training.measure import TrainingData
from bpo.training.reference_pass import complete_store
from bpo.training.shadow import ShadowWeights


def published_reference(output_dir: Path) -> dict[str, Any] | None:
    """The weights that a run published last: `step`, the `files` of `weights_folder`, and an `id`; None if none are."""
    try:
        return json.loads((output_dir / "online" / "reference.json").read_bytes())
    except FileNotFoundError:
        return None


def weights_folder(output_dir: Path, moved_at: int) -> Path:
    return output_dir / "online" / f"reference-{moved_at:08d}" / "weights"


def store_of_reference(config: Config, initial: dict[str, str], moved_at: int) -> tuple[Path, dict[str, str]]:
    """Directory and fingerprint of the store of the weights that were copied after step `moved_at`.

    Args:
        initial: Fingerprint of the policy before its first step, the reference with `moved_at` 0.
    """
    if not moved_at:
        return store_directory(config), initial
    directory = weights_folder(Path(config.train.output_dir), moved_at).parent
    return directory, {**initial, "online": f"weights after step {moved_at}"}


class MovingReference:
    """The reference weights, at first the policy's.

    Args:
        fingerprint: Of the policy before its first step (`run_fingerprint`).

    Attributes:
        moved_at: Number of steps after which the weights were copied last; 0 before the first time.
        write: Writes this rank's part of the weights, given file, `moved_at` and `weights.flats`; for `publish`.
    """

    write: Callable[[Path, int, Any], None]

    def __init__(self, config: Config, trainer: TrainingEngine, fingerprint: dict[str, str]):
        self._config, self._trainer, self._fingerprint = config, trainer, fingerprint
        self._output_dir = Path(config.train.output_dir)
        self._store: ReferenceStore | None = None
        self.every = config.online.reference_every_steps
        self.weights = ShadowWeights(trainer)
        self.moved_at = 0

    def next_move(self, step: int) -> float:
        """The number of steps, above `step`, after which the weights are copied next."""
        is_fixed = self._config.online.reference == "initial"
        return float("inf") if is_fixed else (step // self.every + 1) * self.every

    def after_step(self, number: int, average: ShadowWeights) -> None:
        """Copies the weights if that is due after step `number`, from 1."""
        if number == self.next_move(number - 1):
            self.weights.copy(average if self._config.online.reference == "ema" else None)
            self.moved_at, self._store = number, None
            self.publish()

    def publish(self) -> None:
        """Writes the weights if `online.publish_reference` is set. Call on all ranks."""
        if not self._config.online.publish_reference:
            return
        path = weights_folder(self._output_dir, self.moved_at) / f"rank-{self._trainer.ranks.rank:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write(path.with_suffix(".tmp"), self.moved_at, self.weights.flats)
        sync_directory(path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # a follower may be reading those of an earlier start
        files = gather_from_ranks(path.name)
        from_rank_0(lambda: self._announce(path.parent, files))

    def _announce(self, current: Path, files: list[str]) -> None:
        open_or_create(*store_of_reference(self._config, self._fingerprint, self.moved_at))  # never by a follower
        published = {"step": self.moved_at, "files": files, "id": secrets.token_hex(8)}
        write_durably(self._output_dir / "online" / "reference.json", json.dumps(published) + "\n")
        for folder in (self._output_dir / "online").glob("reference-*/weights"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)

    def fill(self, data: TrainingData, stop: StopRequest | None) -> tuple[ReferenceStore, int]:
        """The store with all entries of some groups, and the number of tokens that were computed for it now.

        Raises:
            Interrupted: on all ranks, if any of them was asked to stop; computed entries are stored.
        """
        ranks = self._trainer.ranks
        if self._store is None:
            directory, fingerprint = store_of_reference(self._config, self._fingerprint, self.moved_at)
            from_rank_0(lambda: open_or_create(directory, fingerprint))
            self._store = ReferenceStore(directory, fingerprint, ranks.rank)
        if self._config.online.publish_reference:
            seen = from_rank_0(self._store.reload)
            if not ranks.is_main:  # no other shards: what rank 0 takes for missing, all ranks compute
                self._store.reload(seen, only=True)
        arguments = self._store, self._config, self._trainer, data, stop, self.weights.using
        return self._store, complete_store(*arguments, quiet=True)

    def remove_stores(self, is_unneeded: Callable[[int], bool]) -> None:
        """Removes stores, chosen by the step after which their weights were copied. To be called on one rank."""
        for folder in sorted((self._output_dir / "online").glob("reference-*")):
            if is_unneeded(int(folder.name.removeprefix("reference-"))):
                # Under this name a follower adds no file, and what it has open need not be removable.
                gone = folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.gone"))
                shutil.rmtree(gone, ignore_errors=True)
