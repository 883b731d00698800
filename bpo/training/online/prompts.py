"""Annotations of an online run: preferred answers, and prompts that the moving policy answers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from bpo.bootstrap.validate import annotation_refusal
from bpo.config.training import Config
from bpo.data.parts import in_part
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_annotations
from bpo.losses.program import LossProgram
from bpo.records import Annotation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The usable annotations, in file order; the bad records so far, and the number of all records."""

    usable: tuple[Annotation, ...]
    bad: BadRecords
    num_records: int

    def content(self) -> Iterator[str]:
        """A line per annotation with all that a step depends on, except the content of its images."""
        for annotation in self.usable:
            yield ascii((annotation.id, annotation.images, annotation.prompt, annotation.response))


def check_online(config: Config) -> None:
    """Raises ValueError if other options do not fit `online.source`."""
    if not config.online.source:
        return
    if config.train.held_out_groups and not config.data.groups:
        raise ValueError(
            "train.held_out_groups is set, but online.source trains on no groups of a file; set data.groups to groups "
            "to evaluate on, or remove it"
        )
    for name in ("reference_model", "reference_only"):
        if getattr(config.train, name):
            raise ValueError(f"train.{name} does not apply to online.source; remove it, or choose online.reference")
    program = LossProgram(config.loss, config.train.seed)
    if program.needs_similarity or program.extrapolation or program.plan.uses_explored:
        raise ValueError(
            "the loss needs embeddings of all prompts, hidden states of a fixed reference, or explored answers, which "
            "online.source does not have; use another loss, or train on data.groups"
        )


def read_prompts(config: Config, held_out: Collection[str]) -> Prompts:
    """Reads `data.annotations`, without those that bootstrapping would skip and those outside `data.part`.

    Args:
        held_out: Ids not to train on.

    Raises:
        ValueError: no annotation is left, or a record is bad and `data.on_bad` is error.
        TooManyBadRecords: more are bad than `data.max_bad_share` allows.
    """
    data, bad = config.data, BadRecords.from_config(config.data)
    read = read_annotations(Path(data.annotations), bad)
    num_records = len(read.annotations) + len(bad.problems) + sum(map(len, read.skipped.values()))
    usable = tuple(
        annotation
        for annotation in read.annotations
        if in_part(annotation.id, data.part)
        and annotation.id not in held_out
        and annotation_refusal(annotation.response, max_words=data.max_completion_words) is None
    )
    logger.info("%s: %d of %d records are prompts of this run", data.annotations, len(usable), num_records)
    if not usable:
        raise ValueError(f"{data.annotations}: none of {num_records} records can be used; `bpo check` says why")
    return Prompts(usable, bad, num_records)
