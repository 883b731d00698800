"""A short training run of every registered loss in one process: `loss_types.py DIR`.

Before each step its loss and gradient are computed again: `LOSSES[name]` on ordinary sums over tokens, with the sums
before the first step as the reference, without the run's terms, kernels and reference store. Writes DIR/observed.json;
test_loss_types.py compares it with the metrics of the runs. Shape letters: N response tokens, P pairs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ranks import fork_ranks
from train_matrix import base_config

from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.training import Config
from bpo.job.launch import Ranks
from bpo.losses.program import HeadOutput
from bpo.losses.registry import LOSSES, LossDefinition
from bpo.losses.values import PairValues
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import model_inputs
from bpo.records import GroupBatch
from bpo.train import train
from bpo.training import step as training

NUM_STEPS = 3
BETA = 0.5
# Options with which a loss differs from its neighbours within three steps.
OPTIONS: dict[str, dict[str, float]] = {"spa": {"alpha": 0.4, "quantile": 0.5}}


def smoothing_of(definition: LossDefinition) -> float:
    """Label smoothing where it exists: without it, `robust` would be `sigmoid`."""
    return 0.1 if definition.smoothing else 0.0


def config_of(root: Path, name: str) -> Config:
    definition = LOSSES[name]
    own = {"type": name, "label_smoothing": smoothing_of(definition), "options": OPTIONS.get(name, {})}
    loss = LossConfig(beta=BETA, **own)
    if definition.pairs == "symmetric":  # with a term that moves the policy from where the two margins are equal
        terms = [TermConfig(label_smoothing=0.1), TermConfig(against="other", **own)]
        loss = LossConfig(beta=BETA, terms=terms, views={"other": ViewConfig(type="other")})
    config = base_config(
        root,
        name,
        epochs=NUM_STEPS,
        groups_per_step=100,
        lr=0.05,
        lr_schedule="constant",
        warmup_ratio=0.0,
        save_every_steps=0,
        reference_dir=str(root / "reference"),
    )
    return replace(config, loss=loss)


def sides_of(rule: str, num_rejected: int) -> list[tuple[int, int | None, float]]:
    """Preferred and dispreferred cells of a group, and the weight of the pair; None is an anchor.

    Cells are the preferred answer, the dispreferred ones; for symmetric pairs then the answer to the other image, and
    under the other image the preferred answer and its own one.
    """
    if rule == "text":
        return [(0, k, 1.0) for k in range(1, num_rejected + 1)]
    if rule == "chosen":
        return [(0, None, float(num_rejected))]
    if rule == "symmetric":
        other, preferred_there, other_there = (num_rejected + k for k in (1, 2, 3))
        return [(0, other, float(num_rejected)), (other_there, preferred_there, float(num_rejected))]
    raise NotImplementedError(f"add the pairs of the rule {rule}, the default of a new loss, here")


@dataclass
class Cells:
    """The cells of a group: log-probs of their tokens in fp64, with gradient, and the key of its embedding."""

    tokens: list[torch.Tensor]
    key: str


def cells_of(batch: GroupBatch, logp_N: torch.Tensor) -> dict[str, Cells]:
    starts = batch.loss_inputs.completion_starts_K1.tolist()
    cells = [logp_N[start:end].double() for start, end in zip(starts[:-1], starts[1:], strict=True)]
    return {
        name: Cells([c for c, owner in zip(cells, batch.group_of_cell, strict=True) if owner == g], batch.group_keys[g])
        for g, name in enumerate(batch.group_ids)
    }


@dataclass
class Truth:
    """A loss by its name, evaluated on the cells of a whole step."""

    definition: LossDefinition
    num_rejected: Mapping[str, int]
    reference: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {**self.definition.options, **OPTIONS.get(self.definition.name, {})}
        self.state = self.definition.state(self.options) if self.definition.state else None

    def values(self, groups: Mapping[str, Cells], embeddings: Any) -> tuple[PairValues, torch.Tensor]:
        """The inputs of the loss and the weights [P] of the pairs."""
        columns: list[list[torch.Tensor]] = [[] for _ in range(8)]
        keys = []
        for name, cells in groups.items():
            for preferred, dispreferred, weight in sides_of(self.definition.pairs, self.num_rejected[name]):
                logp, reference, tokens = self._side(name, cells, preferred)
                other = self._side(name, cells, dispreferred)
                nll = -cells.tokens[preferred].mean()
                row = (logp, other[0], reference, other[1], nll, tokens, other[2], weight)
                for column, value in zip(columns, row, strict=True):
                    column.append(torch.as_tensor(value, dtype=torch.float64))
                keys.append(cells.key)
        *tensors, weight_P = (torch.stack(column) for column in columns)
        return PairValues(
            *tensors,
            beta_P=torch.full_like(weight_P, BETA),
            label_smoothing=smoothing_of(self.definition),
            options=self.options,
            state=self.state,
            similarity_PP=embeddings.similarity(keys) if self.definition.needs_similarity else None,
        ), weight_P

    def _side(self, name: str, cells: Cells, cell: int | None) -> tuple[Any, float, int]:
        """log pi, log pi_ref and the number of tokens."""
        if cell is None:
            return 0.0, 0.0, 0
        logp, count = cells.tokens[cell], len(cells.tokens[cell])
        divisor = count if self.definition.length == "mean" else 1
        reference = self.reference[name][cell] if self.definition.reference else 0.0
        return logp.sum() / divisor, reference / divisor, count


class Observer:
    """Stands for `run_step`: evaluates the loss of a step again before it is run."""

    def __init__(self, name: str, num_rejected: Mapping[str, int]):
        names = ["sigmoid", name] if LOSSES[name].pairs == "symmetric" else [name]
        self.truths = [Truth(LOSSES[each], num_rejected) for each in names]
        self.steps: list[dict[str, Any]] = []

    def __call__(self, trainer, batches, config, num_pairs, step, embeddings, *more):  # type: ignore[no-untyped-def]
        batches = list(batches)
        groups: dict[str, Cells] = {}
        general = 0.0
        for batch in batches:
            with packed_layout(batch.layout):
                logp_N = trainer.policy(**model_inputs(batch))
            groups |= cells_of(batch, logp_N)
            if not trainer.program.couples_groups:
                head = HeadOutput(None, logp_N.detach())
                general += float(trainer.program.apply(head, batch.loss_inputs).total) / num_pairs
        if step == 0:
            for truth in self.truths:
                truth.reference = {name: [float(t.sum()) for t in cells.tokens] for name, cells in groups.items()}
        losses, margin = [], 0.0
        for truth in self.truths:
            values, weight_P = truth.values(groups, embeddings)
            losses.append((weight_P * truth.definition.function(values)).sum() / num_pairs)
            margin = float(values.margin_P.detach().abs().mean())
            if truth.state is not None:
                truth.state.update(truth.state.collect(values).tolist())
        trained = [p for p in trainer.policy.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(losses), trained)  # type: ignore[arg-type]
        norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
        fused, coupled = bool(trainer.program.in_kernel), trainer.program.couples_groups
        observed = {"terms": [float(loss) for loss in losses], "grad_norm": norm, "margin": margin}
        self.steps.append({**observed, "in_kernel": fused, "general": None if coupled else general})
        return training.run_step(trainer, batches, config, num_pairs, step, embeddings, *more)


def run_losses(root: Path, ranks: Ranks) -> None:
    records = [json.loads(line) for line in (root / "groups.jsonl").read_text().splitlines()]
    num_rejected = {r["id"]: sum(not c.get("view") for c in r["completions"]) - 1 for r in records}
    observed = {}
    for name in LOSSES:
        observer = Observer(name, num_rejected)
        with mock.patch("bpo.train.run_step", observer):
            train(config_of(root, name), ranks)
        observed[name] = observer.steps
    (root / "observed.json").write_text(json.dumps(observed))


def main() -> None:
    root = Path(sys.argv[1])
    load_model(config_of(root, "sigmoid").model, for_training=True)  # imports what all ranks need
    fork_ranks(1, partial(run_losses, root))


if __name__ == "__main__":
    main()
