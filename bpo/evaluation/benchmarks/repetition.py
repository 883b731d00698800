"""Repetition in long descriptions: the part of SHR that needs no judge (HA-DPO, arXiv 2311.16839)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.benchmarks.judged import answers_by_id
from bpo.evaluation.benchmarks.shr import PROMPT
from bpo.evaluation.files import read_coco

SIZES = (1, 2, 3, 4)
_REMOVED = str.maketrans("", "", ".:\n?,")


@dataclass(kw_only=True)
class RepetitionOptions(BenchmarkOptions):
    """Options of repetition; the images are those of `instances`, or those that the file `images` lists.

    Attributes:
        instances: COCO instances JSON.
    """

    type: str = "repetition"
    instances: str = ""


@dataclass(frozen=True, kw_only=True)
class RepetitionBenchmark(Benchmark):
    """Metrics `distinct_1` to `distinct_4`: distinct n-grams / n-grams of a description, mean over descriptions.

    Higher is better: 1 is a text without repetition. The official script prints the same figure as "gram-n
    repetition". Words are what white space separates after the characters `.:?,` and line breaks are removed.
    Descriptions with fewer than n words do not count for n; the official script fails on them.
    """

    Options = RepetitionOptions

    @classmethod
    def read(cls, options: RepetitionOptions) -> RepetitionBenchmark:
        path = options.path("instances" if options.instances or not options.images else "images")
        if options.instances:
            images = {str(image_id): file for image_id, file in read_coco(path).file_of_image.items()}
        else:
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} cannot be read ({error}); list one image path per line") from error
            images = {line.strip(): line.strip() for line in lines if line.strip()}
        text = options.asked(options.prompt or PROMPT)
        questions = tuple(Question(id=id, image=image, text=text) for id, image in images.items())
        return cls(options=options, questions=questions, files=(str(path),))

    def score(self, answers: Sequence[str]) -> Scores:
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            shares = {
                f"distinct_{size}": share for size in SIZES if (share := distinct_share(answer, size)) is not None
            }
            counts = {f"{name}/answers": 1.0 for name in shares}
            rows.append((question.resampled, {**shares, **counts}))
            items.append(question.item(answer, **shares))
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {name: ratio(sums[name], sums[f"{name}/answers"]) for name in (f"distinct_{size}" for size in SIZES)}

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """A JSON object of descriptions by image id, as SHR's script reads it."""
        return ".json", answers_by_id(self.questions, answers)


def distinct_share(text: str, size: int) -> float | None:
    """Distinct n-grams of `size` words / all of them; None if the text has fewer words."""
    words = text.translate(_REMOVED).split()
    grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) if grams else None
