"""Measured lengths stored next to the data: restarts reopen no image.

    DIR/FINGERPRINT/RANK-RUN.jsonl      one line per group: its digest, size and time of its images, the measurement

FINGERPRINT covers everything that affects a measurement except the group and its images: tokenizer, image processor,
chat template, model config and length limits. Other settings use another folder, so entries are never stale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpo.data.cells import CellPlan
from bpo.data.encode import Dropped, Encoder
from bpo.data.groups import GroupDataset, MeasuredGroup
from bpo.data.views import Views
from bpo.formats.files import group_to_json
from bpo.job.journal import JournalReader, JournalWriter, to_line
from bpo.records import PreferenceGroup

logger = logging.getLogger(__name__)

FORMAT = 3

Measured = MeasuredGroup | Dropped


def encoder_fingerprint(
    encoder: Encoder, max_words: int, plan: CellPlan | None = None, *, keep_text_only: bool = False
) -> str:
    """16 hexadecimal digits of everything that affects a measurement, except the group."""
    import transformers

    parts = [
        FORMAT,
        transformers.__version__,
        *encoder_parts(encoder).values(),
        str(encoder.image_root.resolve()),
        encoder.max_length_tokens,
        max_words,
        keep_text_only,
        *([] if plan is None or plan == CellPlan() else plan_parts(encoder, plan)),
    ]
    return _digest(parts)[:16]


def plan_parts(encoder: Encoder, plan: CellPlan) -> list[Any]:
    """What of the terms of a loss affects which cells a group has, and their keys."""
    views = Views(encoder, plan.views, plan.seed)
    fields = ("pairs", "reference", "view", "against", "guidance_view", "shared_tokens")
    return [
        [[getattr(term, name) for name in fields] for term in plan.terms],
        {name: views.identity(name) for name in plan.view_names},
        plan.identity,
    ]


def encoder_parts(encoder: Encoder) -> dict[str, Any]:
    """The files of the model that affect a length, by what they are."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "tokenizer class": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        "special tokens": tokenizer.special_tokens_map,
        "chat template": encoder.processor.chat_template,
        "image processor": encoder.processor.image_processor.to_json_string(),
        **({"padding colour": encoder.padding} if encoder.padding else {}),
        **({"system prompt": encoder.system_prompt} if encoder.system_prompt else {}),
        "config": encoder.family.config.to_json_string(use_diff=False),
    }


def lengths_directory(groups_file: Path, output_dir: Path) -> Path:
    """`GROUPS.lengths` next to the groups, or a folder of the run if that cannot be written."""
    folder = groups_file.with_name(groups_file.name + ".lengths")
    if os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK):
        return folder
    logger.info("%s cannot be written: measured lengths go to %s", folder.parent, output_dir / "lengths")
    return output_dir / "lengths"


class MeasuredLengths:
    """Reads the measurements of all runs; appends those of this run to its own file.

    Args:
        directory: Folder of one fingerprint; created with the first measurement.
        dataset: The groups after the filter `completion_types`.
        indices: The groups of this rank; only their entries are kept in memory.
        rank: Part of the file name.
    """

    def __init__(self, directory: Path, dataset: GroupDataset, indices: Sequence[int], rank: int = 0):
        self.directory = directory
        self.dataset = dataset
        self.indices = indices
        self.rank = rank
        self._keys = {index: group_digest(dataset.groups[index]) for index in indices}
        self._known = self._read(set(self._keys.values()))

    def _read(self, wanted: set[str]) -> dict[str, list[tuple[Any, Measured]]]:
        """All measurements of the wanted groups; a group whose images have changed has several."""
        known: dict[str, list[tuple[Any, Measured]]] = {}
        for path in sorted(self.directory.glob("*.jsonl")):
            for _, (key, images, measured) in JournalReader(path).poll(_entry):
                if key in wanted:
                    known.setdefault(key, []).append((images, measured))
        return known

    def known(self, index: int) -> Measured | None:
        """The measurement of a group, or None if there is none for its current image files."""
        entries = self._known.get(self._keys[index])
        if not entries:
            return None
        images = self.dataset.image_identities(index)
        for measured_images, measured in entries:
            if measured_images == images:
                return measured if isinstance(measured, Dropped) else dataclasses.replace(measured, images=images)
        return None

    def measure(self, num_workers: int) -> Iterator[Measured]:
        """Yields the groups of `indices` in order, from the files or measured in worker processes."""
        known = {index: found for index in self.indices if (found := self.known(index)) is not None}
        missing = [index for index in self.indices if index not in known]
        logger.info("measured lengths in %s: %d of %d groups known", self.directory, len(known), len(self.indices))
        # Read before the images: a file that changes in between is measured again next time.
        before = {index: self.dataset.image_identities(index) for index in missing}
        fresh = self.dataset.measure_all(missing, num_workers) if missing else iter(())
        writer: JournalWriter | None = None
        try:
            for index in self.indices:
                measured = known.get(index)
                if measured is None:
                    measured = next(fresh)
                    writer = writer or self._new_journal()
                    what = "dropped" if isinstance(measured, Dropped) else "measured"
                    entry = {"key": self._keys[index], "images": before[index], what: asdict(measured)}
                    writer.append(to_line(entry))
                yield measured
        finally:
            if writer is not None:
                writer.close()

    def _new_journal(self) -> JournalWriter:
        name = f"rank{self.rank:05d}-{os.getpid()}-{os.urandom(3).hex()}.jsonl"
        return JournalWriter(self.directory / name, exclusive=False, sync_each=False)


def group_digest(group: PreferenceGroup) -> str:
    """Of all that a measurement depends on; not its factors, since `keep_types` removes completions of weight 0."""
    tree = group_to_json(group)
    for completion in tree["completions"]:
        for factor in ("weight", "beta", "weights"):
            completion.pop(factor, None)
    return _digest(tree)


def _entry(entry: Any) -> tuple[str, Any, Measured]:
    """The digest of the group, its images and its measurement; raises as `JournalReader.poll` expects."""
    if "dropped" in entry:
        return str(entry["key"]), entry["images"], Dropped(**entry["dropped"])
    measured = MeasuredGroup(**entry["measured"])
    if not all(isinstance(number, int) for number in (measured.num_tokens, measured.num_pairs)):
        raise TypeError("lengths that are not numbers")
    return str(entry["key"]), entry["images"], measured


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
