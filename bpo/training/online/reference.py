"""The reference of an online run: weights that follow the policy, and a store of log-probs for each of their states.

    REFERENCE_DIR                       of the policy before its first step: the store of any run of the model
    OUTPUT/online/reference-00000108    of the weights copied after step 108

A store stays until no checkpoint could need it: a continued run reads what the killed one had computed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from bpo.config.training import Config
from bpo.engine import TrainingEngine
from bpo.job.collectives import from_rank_0
from bpo.job.signals import StopRequest
from bpo.model.reference.store import ReferenceStore, open_or_create, store_directory
from bpo.training.measure import TrainingData
from bpo.training.reference_pass import complete_store
from bpo.training.shadow import ShadowWeights


class MovingReference:
    """The reference weights, at first the policy's.

    Args:
        fingerprint: Of the policy before its first step (`run_fingerprint`).

    Attributes:
        moved_at: Number of steps after which the weights were copied last; 0 before the first time.
    """

    def __init__(self, config: Config, trainer: TrainingEngine, fingerprint: dict[str, str]):
        self._config, self._trainer, self._fingerprint = config, trainer, fingerprint
        self._folder = Path(config.train.output_dir) / "online"
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

    def fill(self, data: TrainingData, stop: StopRequest | None) -> tuple[ReferenceStore, int]:
        """The store with all entries of some groups, and the number of tokens that were computed for it now.

        Raises:
            Interrupted: on all ranks, if any of them was asked to stop; computed entries are stored.
        """
        if self._store is None:
            directory, fingerprint = store_directory(self._config), self._fingerprint
            if self.moved_at:
                directory = self._folder / f"reference-{self.moved_at:08d}"
                fingerprint = {**fingerprint, "online": f"weights after step {self.moved_at}"}
            from_rank_0(lambda: open_or_create(directory, fingerprint))
            self._store = ReferenceStore(directory, fingerprint, self._trainer.ranks.rank)
        arguments = self._store, self._config, self._trainer, data, stop, self.weights.using
        return self._store, complete_store(*arguments, quiet=True)

    def remove_stores(self, is_unneeded: Callable[[int], bool]) -> None:
        """Removes stores, chosen by the step after which their weights were copied. To be called on one rank."""
        for folder in sorted(self._folder.glob("reference-*")):
            if is_unneeded(int(folder.name.removeprefix("reference-"))):
                shutil.rmtree(folder)
