"""Measures of pairs that need the model: is the rejected answer the more plausible one without the image, and with it?

- Blind preference: the log of the mean probability of each answer under K other records' images, rejected minus
  preferred. A black, grey or noise image is not blind, because the model reads it as a picture of that, and a prompt
  without image tokens is one that the model was not trained on and ranks sources the wrong way round.
- Seeing margin: the log-probability of the preferred minus the rejected answer under the record's own images.
- The image's contribution: the seeing margin minus the blind one.

All passes are those of training: the image and prompt are computed once for all answers of a record. The record's own
log-probs are read from the run's reference store, if it has them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.measure.donors import GroupSample, PreprocessedImages, donors, draw_sample, image_digests
from bpo.bootstrap.measure.margins import figures_by_type, log_mean_probability, pair_margins, warnings_of
from bpo.bootstrap.measure.model_journal import ModelJournal, folder_of
from bpo.config.training import Config
from bpo.data.cells import CLEAN, Cell
from bpo.data.encode import Dropped, EncodedGroup, EncodingError, load_encoder
from bpo.data.reference_keys import cell_key
from bpo.formats.bad_records import BadRecords
from bpo.formats.images import ImageError
from bpo.formats.problems import Problem
from bpo.job.durable import replacing
from bpo.job.journal import to_line
from bpo.job.launch import Ranks, pick_device
from bpo.job.signals import StopRequest
from bpo.model.group_scores import GroupScorer, completion_places
from bpo.model.load import ResolvedModel, resolve_model
from bpo.model.reference.store import ReferenceStore, matching_store
from bpo.model.weights import weights_digest
from bpo.records import PreferenceGroup

logger = logging.getLogger(__name__)

# Options of `data` that change no log-prob of a record that is measured; any other, also of later versions, does.
_NOT_DECIDING = set(
    "annotations groups image_root keep_lengths max_completion_words max_bad_share on_bad text_only num_workers "
    "prefetch_factor".split()
)
_SEEING = -1  # the pass with the record's own images


@dataclass(frozen=True, slots=True)
class ModelMeasures:
    """Measures of a sample under a model.

    Attributes:
        types: Completion type -> figures of its pairs, from `figures_by_type`.
        warnings: What is wrong, and what to do.
        num_records: Records measured.
        num_stored: Those of them whose own log-probs are from the reference store.
        left_out: Reason -> groups of the file that are not measured in any sample, such as those without an image.
        skipped: Reason -> records of the sample that could not be measured.
    """

    types: dict[str, dict[str, Any]]
    warnings: list[str]
    num_records: int
    num_stored: int
    left_out: dict[str, int]
    skipped: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_with_model(
    config: Config,
    groups: Iterable[PreferenceGroup],
    bad: BadRecords,
    *,
    ranks: Ranks | None = None,
    stop: StopRequest | None = None,
) -> ModelMeasures | None:
    """Measures a sample of `config.measure.records` groups with the model at `config.model.path`.

    Values of each record are kept in `GROUPS.measures.parts`, so that a restart continues; at the end the values of all
    are written to `GROUPS.measures.jsonl`, for `bpo view`.

    Args:
        groups: The usable groups of `config.data.groups`; read once.
        bad: Collects records with unusable images.

    Returns:
        The measures; None on ranks other than 0.

    Raises:
        ValueError: No record can be measured, too many are bad, or the model cannot be loaded.
        Interrupted: `stop` was received; finished records are kept.
        TimeoutError: On rank 0, if the other ranks' values stop arriving.
    """
    ranks, options = ranks or Ranks(), config.measure
    sample = draw_sample(groups, options.records, options.seed, config.data.max_completion_words)
    if not sample.groups:
        raise ValueError(f"{config.data.groups}: no group has an image and a pair, which this measure needs")
    root = Path(config.data.image_root or ".")
    digests = image_digests(sample.groups, root)
    where = Path(config.data.groups)
    unreadable = {n: (error.code, str(error)) for n, error in enumerate(digests) if isinstance(error, ImageError)}
    _report_bad(sample, unreadable, bad, where)
    parts = where.with_name(where.name + ".measures.parts")
    journal = ModelJournal(folder_of(parts, _identity(config, sample, digests)), len(sample.groups), ranks)
    try:
        if journal.missing():
            _Passes(config, sample, digests, journal, stop).run()
        if not ranks.is_main:
            return None
        values = journal.all(config.bootstrap.stall_timeout_s, stop)
    finally:
        journal.close()
    skipped = {n: (own["skipped"], own["detail"]) for n, own in enumerate(values) if "skipped" in own}
    unusable = {n: why for n, why in skipped.items() if why[0].startswith("image-") and n not in unreadable}
    _report_bad(sample, unusable, bad, where)
    return _measures(config, sample, values, where.with_name(where.name + ".measures.jsonl"))


def _identity(config: Config, sample: GroupSample, digests: Sequence[tuple[str, ...] | ImageError]) -> dict[str, Any]:
    """Option -> value of everything that the values depend on; speed, memory and ranks do not change them."""
    content = hashlib.sha256()
    for group, images in zip(sample.groups, digests, strict=True):
        turns = [[turn.role, [[part.type, part.text] for part in turn.content]] for turn in group.prompt]
        answers = [[completion.response, completion.score] for completion in group.completions]
        found = str(images) if isinstance(images, ImageError) else list(images)
        content.update(to_line([group.id, found, turns, answers]))
    data = {f"data.{name}": v for name, v in asdict(config.data).items() if name not in _NOT_DECIDING}
    return {
        "model.path": config.model.path,
        "model.path (weights)": weights_digest(config.model.path),
        "model.dtype": config.model.dtype,
        "model.vision_attention": config.model.vision_attention,
        **data,
        "measure.blind_images": config.measure.blind_images,
        "measure.records": len(sample.groups),
        "measure.seed": config.measure.seed,
        "data.groups (sampled content)": content.hexdigest(),
    }


@dataclass(slots=True)
class _Open:
    """A record whose passes are in progress; `logp` has the summed log-prob of each distinct answer by pass."""

    encoded: EncodedGroup
    donors: list[int]
    logp: dict[int, list[float]] = field(default_factory=dict)
    stored: bool = False


class _Passes:
    """The forward passes of this rank's records."""

    def __init__(
        self,
        config: Config,
        sample: GroupSample,
        digests: Sequence[tuple[str, ...] | ImageError],
        journal: ModelJournal,
        stop: StopRequest | None,
    ):
        self._config, self._groups, self._digests = config, sample.groups, digests
        self._journal, self._stop = journal, stop
        self._encoder = load_encoder(config)
        self._model: ResolvedModel = resolve_model(config.model, pick_device(journal.ranks), for_training=True)
        self._store: ReferenceStore | None = matching_store(config, self._model)
        kept = config.measure.blind_images + journal.ranks.world_size + 1
        self._images = PreprocessedImages(self._encoder, sample.groups, kept)
        self._open: dict[int, _Open] = {}

    def run(self) -> None:
        """Adds values of every record of this rank to the journal."""
        scorer = GroupScorer(self._model, self._encoder)
        max_tokens = self._config.measure.max_micro_batch_tokens
        for (place, number), _, logp in scorer.score(self._passes(), max_tokens):
            self._open[place].logp[number] = [float(values_N.double().sum()) for values_N in logp]
            self._finish(place)

    def _passes(self) -> Iterator[tuple[tuple[int, int], EncodedGroup]]:
        """((record, number of the pass), group), asked for when the passes before it are finished."""
        missing = self._journal.missing()
        for place in tqdm(missing, desc="measuring", unit="record", disable=not self._journal.ranks.is_main):
            if self._stop is not None:
                self._stop.check(f"{len(self._journal.values)} of {len(self._groups)} records are kept")
            group = self._groups[place]
            started = self._started(place, group)
            if isinstance(started, Dropped):
                self._journal.put(place, {"id": group.id, "skipped": started.reason, "detail": started.detail})
                continue
            self._open[place] = started
            if not started.stored:
                yield (place, _SEEING), started.encoded
            for number, donor in enumerate(started.donors):
                prompt = self._encoder.encode_prompt(group.id, self._images.get(donor), group.prompt)
                yield (place, number), replace(started.encoded, prompt=prompt)

    def _started(self, place: int, group: PreferenceGroup) -> _Open | Dropped:
        """The encoded record and its donors, or why it cannot be measured."""
        digests, wanted = self._digests[place], self._config.measure.blind_images
        try:
            if isinstance(digests, ImageError):
                raise digests
            encoded = self._encoder.encode_group(group, self._images.get(place))
        except (ImageError, EncodingError) as error:
            if self._config.data.on_bad == "error":
                raise
            return Dropped(group.id, error.code if isinstance(error, ImageError) else "image-parts", str(error))
        if isinstance(encoded, Dropped):
            return encoded
        found = list(islice(self._images.usable(donors(place, self._digests)), wanted))
        if len(found) < wanted:
            detail = f"only {len(found)} records of the sample have as many images, of other content, not {wanted}"
            return Dropped(group.id, "too-few-donors", detail)
        started = _Open(encoded, found)
        cells = [Cell(CLEAN, index) for index in range(len(encoded.completion_ids))]
        keys = [cell_key(encoded, cell, digests) for cell in cells]
        if self._store is not None and self._store.has(keys).all():
            started.logp[_SEEING] = [float(self._store.get(key).double().sum()) for key in keys]
            started.stored = True
        return started

    def _finish(self, place: int) -> None:
        """Writes the values of a record if all its passes are done."""
        done, group = self._open[place], self._groups[place]
        if len(done.logp) <= len(done.donors):
            return
        answer = completion_places(self._encoder, group, done.encoded)
        by_image = [done.logp[number] for number in range(len(done.donors))]
        values = {
            "id": group.id,
            "donors": [self._groups[donor].id for donor in done.donors],
            "stored": done.stored,
            "answer": answer,
            "tokens": [len(done.encoded.completion_ids[index]) for index in answer],
            "seeing": [round(done.logp[_SEEING][index], 5) for index in answer],
            "blind": [[round(logp[index], 5) for logp in by_image] for index in answer],
        }
        self._journal.put(place, values)
        del self._open[place]


def _report_bad(sample: GroupSample, faults: Mapping[int, tuple[str, str]], bad: BadRecords, where: Path) -> None:
    """Reports bad records: place in the sample -> code and message."""
    for place, (code, detail) in faults.items():
        bad.report(Problem(code, str(where), sample.groups[place].id, detail))
    if faults:
        bad.check_share(len(sample.groups), f"the sample of {where}", advice="is data.image_root the right folder?")


def _measures(config: Config, sample: GroupSample, values: Sequence[dict[str, Any]], out: Path) -> ModelMeasures:
    """The figures of all records; writes the values of each to `out`."""
    with replacing(out) as file:
        for group, own in zip(sample.groups, values, strict=True):
            if "skipped" not in own:
                file.write(to_line(_line(group, own), ensure_ascii=False))
    pairs = list(pair_margins(sample.groups, values, load_lexicon(config.bootstrap.validate.lexicon)))
    skipped = Counter(own["skipped"] for own in values if "skipped" in own)
    if not pairs:
        first = next((own["detail"] for own in values if "skipped" in own), "")
        raise ValueError(f"{config.data.groups}: no record of the sample could be measured; the first: {first}")
    types = figures_by_type(pairs, config.measure)
    return ModelMeasures(
        types=types,
        warnings=warnings_of(types, config.measure),
        num_records=len(values) - skipped.total(),
        num_stored=sum(bool(own.get("stored")) for own in values),
        left_out=sample.left_out,
        skipped=dict(sorted(skipped.items())),
    )


def _line(group: PreferenceGroup, own: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of each completion of a record, in nats: `seeing` under its own images, `blind` under the donors'."""
    completions = [
        {
            "response": completion.response,
            "tokens": tokens,
            "seeing": seeing,
            "blind": round(log_mean_probability(by_image), 5),
        }
        for completion, tokens, seeing, by_image in zip(
            group.completions, own["tokens"], own["seeing"], own["blind"], strict=True
        )
    ]
    return {"id": group.id, "donors": own["donors"], "completions": completions}
