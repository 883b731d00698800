"""MME's hallucination subset (arXiv 2306.13394): existence, count, position, color; two questions per image.

    TASK/score = 100 * (accuracy + accuracy_plus), at most 200;  total = sum of the scores, at most 800

`accuracy` is the share of right answers, `accuracy_plus` that of images with both answers right. As in the official
`calculation.py`, an answer is read from its first four characters in lower case: a yes if they contain "yes", else a no
if they contain "no" (so also "not" and "now"), else neither and wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bpo.evaluation.benchmark import YES_NO, Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.files import text_field
from bpo.formats.importers.csvfiles import table_pieces
from bpo.formats.jsonfiles import open_file, read_records

TASKS = ("existence", "count", "position", "color")
_PICTURES = (".jpg", ".jpeg", ".png")
_ONE_LINE = str.maketrans("\t\r\n", "   ")


def read_yes_no(answer: str) -> str:
    """yes, no or other, as the official script reads an answer."""
    start = answer[:4].lower()
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@dataclass(kw_only=True)
class MmeOptions(BenchmarkOptions):
    """Options of MME.

    Attributes:
        data: MME's folder, with TASK.txt (lines `image`, `question`, `answer`, separated by tabs) or TASK/ with images
            and a text file per image (lines `question`, `answer`); or a TSV, JSONL or JSON file with `category`,
            `image` (or `image_path`), `question` and `answer`.
    """

    type: str = "mme"
    data: str = ""


@dataclass(frozen=True, slots=True)
class Truth:
    """Task of a question, and its answer: yes or no."""

    task: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class MmeBenchmark(Benchmark):
    """Question ids are TASK/IMAGE/1 and TASK/IMAGE/2; the unit is an image within a task."""

    Options = MmeOptions
    max_new_tokens: ClassVar[int] = 16
    not_fractions: ClassVar[frozenset[str]] = frozenset(("total", *(f"{task}/score" for task in TASKS)))
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"unreadable"})

    truth: Mapping[str, Truth]

    @classmethod
    def read(cls, options: MmeOptions) -> MmeBenchmark:
        path = options.path("data")
        seen: Counter[str] = Counter()
        questions, truth, files = [], {}, dict[str, None]()
        for record, where, file in _folder_records(path) if path.is_dir() else _file_records(path):
            task, image, text, answer = (text_field(record, key, where) for key in ("category", *_FIELDS))
            if answer.strip().lower() not in ("yes", "no"):
                raise ValueError(f"{where}: field 'answer' is {answer!r}; it must be Yes or No")
            unit = f"{task}/{image.removeprefix(f'{task}/')}"
            seen[unit] += 1
            question = f"{unit}/{seen[unit]}"
            questions.append(Question(id=question, image=image, text=options.asked(text), unit=unit, labels=YES_NO))
            truth[question] = Truth(task, answer.strip().lower())
            files[str(file)] = None
        for unit, count in seen.items():
            if count != 2:
                raise ValueError(f"{path}: {unit} has {count} questions; MME has two per image, repair the file")
        if missing := [task for task in TASKS if not any(each.task == task for each in truth.values())]:
            raise ValueError(f"{path}: task {missing[0]!r} has no question; the subset is {', '.join(TASKS)}")
        return cls(options=options, questions=tuple(questions), files=tuple(files), truth=truth)

    def score(self, answers: Sequence[str]) -> Scores:
        rows, items = [], []
        correct_of_unit: Counter[tuple[str, str]] = Counter()
        for question, answer in zip(self.questions, answers, strict=True):
            truth, said = self.truth[question.id], read_yes_no(answer)
            correct_of_unit[question.unit, truth.task] += said == truth.answer
            counts = {
                f"{truth.task}/questions": 1.0,
                f"{truth.task}/correct": float(said == truth.answer),
                "unreadable": float(said == "other"),
            }
            rows.append((question.resampled, counts))
            items.append(question.item(answer, task=truth.task, label=truth.answer, read_as=said))
        for (unit, task), correct in correct_of_unit.items():
            rows.append((unit, {f"{task}/images": 1.0, f"{task}/both": float(correct == 2)}))
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        tasks = [task for task in TASKS if f"{task}/questions" in sums]
        for task in tasks:
            accuracy = ratio(sums[f"{task}/correct"], sums[f"{task}/questions"])
            plus = ratio(sums[f"{task}/both"], sums[f"{task}/images"])
            found |= {
                f"{task}/accuracy": accuracy,
                f"{task}/accuracy_plus": plus,
                f"{task}/score": 100 * (accuracy + plus),
            }
        total = sum((found[f"{task}/score"] for task in tasks), np.zeros(()))
        asked = sums.total(f"{task}/questions" for task in tasks)
        return {"total": total, "unreadable": ratio(sums["unreadable"], asked), **found}

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """Lines `TASK/image`, `question`, `label`, `answer`; the official tool reads those of each task from TASK.txt.

        Tabs and line breaks become spaces, one each, so that the tool reads the same first characters.
        """
        lines = []
        for question, answer in zip(self.questions, answers, strict=True):
            cells = (question.unit, question.text, self.truth[question.id].answer.capitalize(), answer)
            lines.append("\t".join(cell.translate(_ONE_LINE) for cell in cells) + "\n")
        return ".txt", "".join(lines)


_FIELDS = ("image", "question", "answer")
_Records = Iterator[tuple[Mapping[str, Any], str, Path]]


def _file_records(path: Path) -> _Records:
    """Records of the subset's tasks, where they are, and the file."""
    if path.suffix.lower() == ".tsv":
        found = ((piece.parse(), piece.where) for piece in table_pieces(path, "\t"))
    else:
        found = ((record.value, record.where) for record in read_records(path))
    for record, where in found:
        if record.get("category") in TASKS:
            yield {**record, "image": record.get("image_path", record.get("image"))}, where, path


def _folder_records(path: Path) -> _Records:
    for task in TASKS:
        lists, folder = path / f"{task}.txt", path / task
        if lists.is_file():
            for cells, where in _lines(lists, 3):
                record = dict(zip(_FIELDS, cells, strict=True))
                yield {**record, "category": task, "image": f"{task}/{cells[0]}"}, where, lists
        elif folder.is_dir():
            pictures = {file.stem: file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in _PICTURES}
            for file in sorted(folder.glob("*.txt")):
                if file.stem not in pictures:
                    raise ValueError(f"{file}: there is no picture of this name; expected {file.stem}.jpg next to it")
                for (question, answer), where in _lines(file, 2):
                    image = f"{task}/{pictures[file.stem]}"
                    yield {"category": task, "image": image, "question": question, "answer": answer}, where, file


def _lines(path: Path, num_cells: int) -> Iterator[tuple[list[str], str]]:
    with open_file(path) as file:
        text = file.read().decode("utf-8-sig")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) != num_cells:
                raise ValueError(f"{path}, line {number}: {len(cells)} cells between tabs; {num_cells} are needed")
            yield cells, f"{path}, line {number}"
