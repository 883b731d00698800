"""`bpo rank --images`: for each annotation, a judge picks the best of several images (PDS-DPO, arXiv 2412.17417)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bpo.config.io import check_inputs
from bpo.config.options import check
from bpo.config.training import Config
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import iterate_annotations
from bpo.formats.problems import Problem
from bpo.formats.schema import annotation_to_json
from bpo.job.durable import replacing
from bpo.job.journal import to_line
from bpo.job.signals import StopRequest
from bpo.ranking.judge import Judgement
from bpo.ranking.judgements import read_judgements
from bpo.ranking.run import GroupSpool, RankSummary, judge_groups
from bpo.records import Annotation, Completion, PreferenceGroup

FIELD = "candidate_images"


def run_image_choice(config: Config, stop: StopRequest | None = None, progress: bool = True) -> RankSummary:
    """Writes `data.annotations` to `rank.output`, in bpo's format, each with the best of its `candidate_images`.

    The judge sees one group per image, with the annotation as its only completion; of equal scores, the first image is
    taken. Annotations without the field are copied; those none of whose images can be judged are left out. Judgements
    are in OUTPUT.judgements, from which a restarted job goes on.

    Raises:
        ValueError: As `run_rank`; or an option is missing.
    """
    check_inputs(config, ("data.annotations",))
    check(bool(config.rank.output), "rank.output is empty; name the file for the annotations")
    source, output = Path(config.data.annotations), Path(config.rank.output)
    bad = BadRecords.from_config(config.data)
    folder = output.with_name(f"{output.name}.judgements")
    groups = GroupSpool(
        group for annotation in iterate_annotations(source, bad) for group in _groups(annotation, source, bad)
    )
    summary = judge_groups(config, groups, bad, folder, stop, progress)
    if not summary.is_finished:
        return summary
    known = read_judgements(folder)
    with replacing(output) as file:
        for annotation in iterate_annotations(source, quiet := BadRecords("quarantine")):
            results = [(known.of(group), group.images) for group in _groups(annotation, source, quiet)]
            scored = [(found.scored.scores[0], images) for found, images in results if isinstance(found, Judgement)]
            if scored:
                annotation = replace(annotation, images=max(scored, key=lambda entry: entry[0])[1])
            if scored or FIELD not in annotation.extra:
                file.write(to_line(annotation_to_json(annotation), ensure_ascii=False))
    return summary


def _groups(annotation: Annotation, source: Path, bad: BadRecords) -> Iterator[PreferenceGroup]:
    """A group for each candidate image; none if the field is missing, or malformed, which is reported."""
    images = annotation.extra.get(FIELD, [])
    if FIELD not in annotation.extra:
        return
    if not (isinstance(images, list) and images and all(isinstance(image, str) for image in images)):
        detail = f"{source}, id {annotation.id!r}: field {FIELD!r} is {images!r:.80}; write a list of paths"
        bad.report(Problem("wrong-type", str(source), annotation.id, detail))
    elif len(annotation.images) != 1:
        detail = f"{source}, id {annotation.id!r}: {len(annotation.images)} images; {FIELD!r} replaces a single one"
        bad.report(Problem("image-parts", str(source), annotation.id, detail))
    else:
        answer = (Completion(annotation.response, 1.0, "gt"),)
        for number, image in enumerate(images):
            yield PreferenceGroup(f"{annotation.id}#image-{number}", (image,), annotation.prompt, answer)
