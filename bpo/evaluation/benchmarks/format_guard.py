"""Format guard: does the model still answer in the form that a question asks for?

Preference training on long descriptions can make a model describe where it should say yes, no, or a single word.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from bpo.evaluation.benchmark import YES_NO, Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.benchmarks.pope import first_word
from bpo.evaluation.files import CocoImages, read_coco, text_field, unique_ids
from bpo.formats.jsonfiles import read_records
from bpo.formats.lexicon import ObjectLexicon, build_lexicon

Kind = Literal["yes_no", "short"]
MAX_SHORT_WORDS = 3
YES_NO_PROMPT = "Is there {object} in the image? Please answer yes or no."
SHORT_PROMPT = "Name one object in the image. Answer with a single word."


@dataclass(frozen=True, slots=True)
class Asked:
    """Form of a question, and the answers that are right: one of `YES_NO`, or names of objects."""

    kind: Kind
    right: tuple[str, ...]


@dataclass(kw_only=True)
class FormatGuardOptions(BenchmarkOptions):
    """Options of the format guard; either file is enough.

    Attributes:
        questions: Records with `image`, `text`, `label`, and optionally `id` and `kind`: yes_no, or short; without it,
            the label tells. JSONL or one list.
        instances: COCO instances JSON, from which questions are made if there is no file of them: for each image with
            an object whether a present and whether an absent one is there, and for the name of any object. `seed`
            draws the objects.
    """

    type: str = "format_guard"
    questions: str = ""
    instances: str = ""


@dataclass(frozen=True, kw_only=True)
class FormatGuardBenchmark(Benchmark):
    """A yes/no answer has the form if its first word is yes or no, in any case and after any punctuation and markup.

    A short one has it if it has 1 to `MAX_SHORT_WORDS` words. Metrics: `format` (share of all answers with the form),
    `yes_no_readable`, `yes_no_accuracy` (unreadable answers are wrong), `yes_ratio`, `short` (share of short answers
    with the form), `short_accuracy` (share that names the label, or a present object); those of the kinds asked.
    """

    Options = FormatGuardOptions
    max_new_tokens: ClassVar[int] = 64

    asked: dict[str, Asked]
    lexicon: ObjectLexicon

    @classmethod
    def read(cls, options: FormatGuardOptions) -> FormatGuardBenchmark:
        path = options.path("questions" if options.questions or not options.instances else "instances")
        if options.questions:
            pairs = list(_from_file(path, options))
            names = {name for _, asked in pairs for name in asked.right}
            lexicon = build_lexicon([name] for name in sorted(names) or YES_NO)
        else:
            coco = read_coco(path)
            pairs, lexicon = list(_from_coco(coco, options)), coco.lexicon
        questions = tuple(question for question, _ in pairs)
        unique_ids(questions, str(path))
        asked = {question.id: asked for question, asked in pairs}
        return cls(options=options, questions=questions, files=(str(path),), asked=asked, lexicon=lexicon)

    def score(self, answers: Sequence[str]) -> Scores:
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            asked = self.asked[question.id]
            if asked.kind == "yes_no":
                word = first_word(answer)
                has_form, is_right = word in ("yes", "no"), word == asked.right[0].lower()
            else:
                has_form = 1 <= len(answer.split()) <= MAX_SHORT_WORDS
                right = {self.lexicon.canonical(name) for name in asked.right}
                is_right = any(mention.object in right for mention in self.lexicon.mentions(answer))
            counts = {"asked": 1, "form": has_form, "right": is_right}
            row = {f"{asked.kind}/{name}": float(count) for name, count in counts.items()}
            if asked.kind == "yes_no":
                row["yes"] = float(word == "yes")
            rows.append((question.resampled, row))
            items.append(question.item(answer, kind=asked.kind, label=list(asked.right), form=has_form, right=is_right))
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        yes_no, short = sums["yes_no/asked"], sums["short/asked"]
        found = {"format": ratio(sums["yes_no/form"] + sums["short/form"], yes_no + short)}
        if "yes_no/asked" in sums:
            found["yes_no_readable"] = ratio(sums["yes_no/form"], yes_no)
            found["yes_no_accuracy"] = ratio(sums["yes_no/right"], yes_no)
            found["yes_ratio"] = ratio(sums["yes"], yes_no)
        if "short/asked" in sums:
            found["short"] = ratio(sums["short/form"], short)
            found["short_accuracy"] = ratio(sums["short/right"], short)
        return found


def _question(options: BenchmarkOptions, id: str, image: str, text: str, asked: Asked) -> tuple[Question, Asked]:
    labels = YES_NO if asked.kind == "yes_no" else ()
    return Question(id=id, image=image, text=options.asked(text), labels=labels), asked


def _from_file(path: Path, options: BenchmarkOptions) -> Iterator[tuple[Question, Asked]]:
    for record in read_records(path):
        entry, where = record.value, record.where
        label = text_field(entry, "label", where).strip()
        says = label.capitalize() in YES_NO
        kind: Any = entry.get("kind", "yes_no" if says else "short")
        if kind not in ("yes_no", "short"):
            raise ValueError(f"{where}: field 'kind' is {kind!r}; it must be yes_no or short")
        if (kind == "yes_no" and not says) or not any(map(str.isalnum, label)):
            raise ValueError(
                f"{where}: field 'label' is {label!r}; it must be {'yes or no' if kind == 'yes_no' else 'a word'}"
            )
        right = (label.capitalize() if kind == "yes_no" else label,)
        id = str(entry.get("id", entry.get("question_id", record.index)))
        yield _question(
            options, id, text_field(entry, "image", where), text_field(entry, "text", where), Asked(kind, right)
        )


def _from_coco(coco: CocoImages, options: BenchmarkOptions) -> Iterator[tuple[Question, Asked]]:
    for image_id, image in coco.file_of_image.items():
        present = sorted(coco.present_of_image[image_id])
        absent = sorted({*coco.lexicon.objects} - {*present})
        if not present or not absent:
            continue
        rng = random.Random(f"{options.seed} {image}")
        for label, objects in (("Yes", present), ("No", absent)):
            name = rng.choice(objects)
            text = YES_NO_PROMPT.format(object=f"{'an' if name[0] in 'aeiou' else 'a'} {name}")
            yield _question(options, f"{image_id}/{label.lower()}", image, text, Asked("yes_no", (label,)))
        yield _question(options, f"{image_id}/short", image, SHORT_PROMPT, Asked("short", tuple(present)))
