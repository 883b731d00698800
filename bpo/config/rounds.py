"""Options of `bpo rounds`: generation, judging, selection and training, again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bpo.config.options import Section, needed, number


@dataclass(kw_only=True)
class RoundConfig(Section):
    """One round. All other options are those of the whole configuration, unless `options` replaces them.

    Attributes:
        part: For data.part, such as 1/3: the part of the annotations that the round generates from.
        groups: Groups file to train on; the round then generates, judges and selects nothing.
        replay: Groups of all earlier rounds to train on as well, relative to the number of the round's own.
        options: Options of this round by section, such as {train: {lr: 3.0e-7}}.
    """

    where = "rounds.each"

    part: str = ""
    groups: str = ""
    replay: float = number(0.0, at_least=0)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RoundsConfig(Section):
    """Rounds of generation by the current policy and training (docs/rounds.md).

    Attributes:
        output_dir: Folder of all rounds; each has a folder round-N.
        each: The rounds, in order: mappings with the options of `RoundConfig`, part, groups, replay and options.
        reference: Reference of each round: the `previous` round's policy, with which it starts, or the `first` one,
            model.path.
        handover: Form in which a round's policy is handed to the next round's engines: `merged` weights, a LoRA
            `adapter` on model.path, or `auto`: an adapter if only LoRA and projector are trained and the engine of
            generation takes it.
        processes: Number of processes of generation, judging and training on this machine; on SLURM the scripts decide.
        evaluate: Evaluate the policy of each round with evaluation.*.
        image_command: Program that scores the `candidate_images` of each annotation before the first round (PDS-DPO);
            the best one is used. See the judge `command`.
    """

    where = "rounds"

    output_dir: str = needed("runs/rounds")
    each: list[dict[str, Any]] = field(default_factory=list)
    reference: Literal["previous", "first"] = "previous"
    handover: Literal["auto", "merged", "adapter"] = "auto"
    processes: int = number(1, at_least=1, at_most=1024)
    evaluate: bool = False
    image_command: str = ""
