"""Judges captions by the objects that they name and the image lacks: CHAIR (arXiv 1809.02156) as a score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bpo.config.options import Section, number
from bpo.config.training import Config
from bpo.evaluation.benchmarks.chair import Description
from bpo.evaluation.files import present_objects, read_coco, read_synonyms
from bpo.formats.jsonfiles import parse_json
from bpo.formats.lexicon import ObjectLexicon, build_lexicon
from bpo.job.durable import file_digest
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Judge, Scored, register_judge
from bpo.ranking.options import judge_options
from bpo.records import PreferenceGroup


@dataclass(kw_only=True)
class ChairJudgeOptions(Section):
    """Options of the judge `chair`.

    Attributes:
        instances: COCO instances JSON; empty uses evaluation.chair_instances.
        captions: COCO captions JSON, whose objects also count as present; empty uses evaluation.chair_captions.
        synonyms: One object per line, canonical name first; empty uses evaluation.synonyms, or else the names alone.
        detections: In place of COCO files, a detector's output: JSONL of {"image": path, "objects": [name, ...]}.
        score: Minus the `count` of hallucinated mentions, or minus their `rate` among all mentions (CHAIR_i).
        recall: Weight of the share of present objects that the answer names, which is added.
    """

    where = "rank.options"

    instances: str = ""
    captions: str = ""
    synonyms: str = ""
    detections: str = ""
    score: Literal["count", "rate"] = "count"
    recall: float = number(0.0, at_least=0)


@register_judge("chair")
class ChairJudge(Judge):
    """Details of a completion: `named`, `hallucinated` (one per mention) and `missed` objects."""

    def __init__(self, config: Config, ranks: Ranks):
        self.options = options = judge_options(ChairJudgeOptions, config)
        files = {"synonyms": options.synonyms or config.evaluation.synonyms, "detections": options.detections}
        if not options.detections:
            files["instances"] = options.instances or config.evaluation.chair_instances
            files["captions"] = options.captions or config.evaluation.chair_captions
        self._files = {name: Path(file) for name, file in files.items() if file}
        synonyms, captions = self._files.get("synonyms"), self._files.get("captions")
        if options.detections:
            self._present, self._lexicon = _read_detections(self._files["detections"], synonyms)
        elif "instances" in self._files:
            coco = read_coco(self._files["instances"], captions, synonyms)
            self._present = {name: coco.present_of_image[image_id] for image_id, name in coco.file_of_image.items()}
            self._lexicon = coco.lexicon
        else:
            raise ValueError("the judge chair needs the objects of images: set rank.options.instances or detections")

    def identity(self) -> dict[str, Any]:
        digests = {f"{name} (SHA-256)": file_digest(file) for name, file in self._files.items()}
        return {"score": self.options.score, "recall": self.options.recall, **digests}

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        for index, group in enumerate(groups):
            known = [self._present.get(image, self._present.get(Path(image).name)) for image in group.images]
            if not known or None in known:
                yield index, Failed(f"no objects are known of its image: {', '.join(group.images)}")
                continue
            present = frozenset().union(*(objects for objects in known if objects is not None))
            found = [Description(present, self._lexicon.mentions(answer.response)) for answer in group.completions]
            yield index, Scored(tuple(map(self._score, found)), tuple(map(_details, found)))

    def _score(self, found: Description) -> float:
        counts = found.counts()
        of = max(counts["mentions"], 1.0) if self.options.score == "rate" else 1.0
        return self.options.recall * counts["named"] / max(counts["present"], 1.0) - counts["hallucinated"] / of


def _details(found: Description) -> dict[str, Any]:
    hallucinated = [mention.object for mention in found.hallucinated]
    return {"named": sorted(found.named), "hallucinated": hallucinated, "missed": list(found.missing)}


def _read_detections(path: Path, synonyms: Path | None) -> tuple[dict[str, frozenset[str]], ObjectLexicon]:
    """Image -> objects, and the lexicon of their names.

    Raises:
        ValueError: The file cannot be read, or a line has another form; names the line.
    """
    objects_of_image: dict[str, list[str]] = {}
    try:
        for number_, line in enumerate(path.read_bytes().splitlines(), 1):
            entry = parse_json(line, f"{path}:{number_}")
            objects_of_image.setdefault(str(entry["image"]), []).extend(map(str, entry["objects"]))
    except (OSError, LookupError, TypeError) as error:
        raise ValueError(f'{path}: {error!r}; write lines of {{"image": path, "objects": [name, ...]}}') from error
    names = sorted({name for names in objects_of_image.values() for name in names})
    lexicon = read_synonyms(synonyms) if synonyms else build_lexicon([name] for name in names)
    return {image: present_objects(lexicon, names) for image, names in objects_of_image.items()}, lexicon
