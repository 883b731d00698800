"""Options of training on negatives that the moving policy generates between steps (SAPO, arXiv 2405.20830)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpo.config.options import Section, number


@dataclass(kw_only=True)
class OnlineConfig(Section):
    """Negatives from an exponential moving average (EMA) of the policy, made during training.

    The prompts and preferred answers are those of data.annotations. Sampling options are those of bootstrap.segment.

    Attributes:
        source: `segment` regenerates a segment of each annotation; empty trains on data.groups.
        ema_decay: Decay b of the average after each step, ema = b ema + (1 - b) policy.
        reference: Weights of the reference: `ema` or `policy` copies them every `reference_every_steps` steps,
            `initial` keeps those before the first step.
        reference_every_steps: Steps between two copies.
        generate_every_steps: Steps for which negatives are generated at once, by the average at the first of them. 1 is
            the method; more costs fewer pauses.
        batch_size: Number of negatives generated per batch.
        buffer_size: Number of latest groups in the replay buffer, from which each step draws with replacement, with
            odds 1 / (1 + times drawn). Every checkpoint contains it.
        publish_reference: Write the weights of the reference at each start and each move, for `bpo refs follow`, and
            read the log-probs that it has stored.
    """

    where = "online"

    source: Literal["", "segment"] = ""
    ema_decay: float = number(0.5, at_least=0, below=1)
    reference: Literal["ema", "policy", "initial"] = "ema"
    reference_every_steps: int = number(108, at_least=1)
    generate_every_steps: int = number(1, at_least=1)
    batch_size: int = number(16, at_least=1)
    buffer_size: int = number(2000, at_least=1, at_most=20_000)
    publish_reference: bool = False
