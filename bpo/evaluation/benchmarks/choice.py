"""Multiple choice with lettered options, as in HumbleBench (arXiv 2509.09658), which offers "None of the above"."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import ClassVar

import numpy as np

from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio
from bpo.evaluation.files import id_field, text_field, unique_ids
from bpo.formats.jsonfiles import JsonRecord, read_records

PROMPT = "Answer with the option's letter from the given choices directly."
NONE_OF_THE_ABOVE = "none of the above"
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Choice:
    """A question as in its file, with its options by letter, its right letter, and its category (may be empty)."""

    id: int | str
    question: str
    options: dict[str, str]
    right: str
    category: str

    @property
    def none_of_the_above(self) -> str:
        """The letter of "None of the above", or empty."""
        return next((letter for letter, text in self.options.items() if _plain(text) == NONE_OF_THE_ABOVE), "")


@dataclass(kw_only=True)
class ChoiceOptions(BenchmarkOptions):
    """Options of multiple choice; `prompt` replaces the instruction after the question.

    Attributes:
        questions: Records with `question`, `image` (a path, or an object with `path`), `answer` or `label` (a letter),
            and optionally `options` (a list; otherwise lines such as "A. dog" of the question), `category` or `type`,
            `question_id` or `id`. JSONL or one list.
    """

    type: str = "choice"
    questions: str = ""


@dataclass(frozen=True, kw_only=True)
class ChoiceBenchmark(Benchmark):
    """Metrics: `accuracy` (unreadable answers are wrong), also `CATEGORY/accuracy`, and `unreadable`.

    `none_of_the_above_accuracy` is the accuracy where that option is right, `none_of_the_above_false` the share of the
    other questions for which it was chosen although offered. HumbleBench's own script counts an answer as right if the
    letter is among its words and no other letter is; `read_letter` also reads "B because a ..." and an option's text.
    """

    Options = ChoiceOptions
    max_new_tokens: ClassVar[int] = 64
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"none_of_the_above_false", "unreadable"})

    choices: dict[str, Choice]

    @classmethod
    def read(cls, options: ChoiceOptions) -> ChoiceBenchmark:
        path = options.path("questions")
        pairs = [_read(record, options) for record in read_records(path)]
        questions = tuple(question for question, _ in pairs)
        unique_ids(questions, str(path))
        choices = {question.id: choice for question, choice in pairs}
        return cls(options=options, questions=questions, files=(str(path),), choices=choices)

    def score(self, answers: Sequence[str]) -> Scores:
        rows, items = [], []
        for question, answer in zip(self.questions, answers, strict=True):
            choice = self.choices[question.id]
            letter, none = read_letter(answer, choice.options), choice.none_of_the_above
            right = letter == choice.right
            counts: dict[str, float] = {"questions": 1, "right": right, "unreadable": not letter}
            if none:
                side = "none" if choice.right == none else "some"
                counts |= {f"{side}_questions": 1, f"{side}_as_none": letter == none}
            if choice.category:
                counts |= {f"{choice.category}/questions": 1, f"{choice.category}/right": right}
            rows.append((question.resampled, counts))
            items.append(
                question.item(answer, label=choice.right, read_as=letter, right=right, category=choice.category)
            )
        return Scores(tuple(rows), tuple(items))

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        categories = [name.removesuffix("/questions") for name in sums if name.endswith("/questions")]
        return {
            "accuracy": ratio(sums["right"], sums["questions"]),
            "none_of_the_above_accuracy": ratio(sums["none_as_none"], sums["none_questions"]),
            "none_of_the_above_false": ratio(sums["some_as_none"], sums["some_questions"]),
            "unreadable": ratio(sums["unreadable"], sums["questions"]),
            **{f"{name}/accuracy": ratio(sums[f"{name}/right"], sums[f"{name}/questions"]) for name in categories},
        }

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str]:
        """JSONL in the form of HumbleBench: question_id, question, type, image, label and prediction."""
        lines = []
        for question, answer in zip(self.questions, answers, strict=True):
            choice = self.choices[question.id]
            entry = {"question_id": choice.id, "question": choice.question, "type": choice.category}
            entry |= {"image": question.image, "label": choice.right, "prediction": answer}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        return ".jsonl", "".join(lines)


def read_letter(answer: str, options: dict[str, str]) -> str:
    """The letter that an answer chooses, or empty.

    In this order: a letter at the start, alone or before a mark ("B", "(b)", "**B.** A dog"); the last letter after
    "answer", "option" or "choice" ("The answer is B"); the only capital letter that stands alone, but for the article
    "A"; the option whose text the answer contains, the longest if it includes the others.
    """
    text = re.sub(r"[*_`$]", "", answer).strip()
    letters = "".join(options)
    for pattern in (
        rf"\W*([{letters}{letters.lower()}])(?=\s*(?:[.):,\n-]|$))",
        rf".*\b(?i:answer|option|choice)\b(?:\s+(?i:is))?\W*(?:(?i:option)\s+)?([{letters}])(?!\s*[a-z']|\w)",
    ):
        if found := re.match(pattern, text, re.DOTALL):
            return found.group(1).upper()
    alone = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", re.sub(r"\bA\s+(?=[a-z])", "", text)))
    if len(alone) == 1:
        return str(alone.pop())
    texts = {letter: f" {_plain(option)} " for letter, option in options.items()}
    named = [letter for letter in options if texts[letter] in f" {_plain(text)} "]
    longest = max(named, key=lambda letter: len(texts[letter]), default="")
    return longest if all(texts[letter] in texts[longest] for letter in named) else ""


def _plain(text: str) -> str:
    """Words in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _read(record: JsonRecord, options: BenchmarkOptions) -> tuple[Question, Choice]:
    entry, where = record.value, record.where
    text, listed = text_field(entry, "question", where), entry.get("options")
    if listed is None:
        lettered = dict(_OPTION_LINE.findall(text))
    elif isinstance(listed, list) and len(listed) <= len(ascii_uppercase) and all(isinstance(o, str) for o in listed):
        lettered = dict(zip(ascii_uppercase, listed, strict=False))
        text = "\n".join([text, *(f"{letter}. {option}" for letter, option in lettered.items())])
    else:
        raise ValueError(f"{where}: field 'options' is {listed!r}; it must be a list of texts")
    if len(lettered) < 2 or not all(map(_plain, lettered.values())):
        raise ValueError(f"{where}: there are no options; give a list `options`, or lines such as 'A. dog'")
    right = text_field(entry, "answer" if "answer" in entry else "label", where).strip().upper()
    if right not in lettered:
        raise ValueError(f"{where}: the answer is {right!r}; it must be one of {', '.join(lettered)}")
    image = entry.get("image", "")
    image = image.get("path") if isinstance(image, dict) else image
    category = entry.get("category", entry.get("type", ""))
    if not isinstance(image, str) or not isinstance(category, str):
        raise ValueError(f"{where}: the image is {image!r} and the category {category!r}; both must be text")
    key = next((key for key in ("question_id", "id") if key in entry), "")
    id = id_field(entry, key, where) if key else record.index
    question = Question(
        id=str(id),
        image=image,
        text=options.asked(f"{text}\n{options.prompt or PROMPT}"),
        labels=tuple(lettered),
    )
    return question, Choice(id, text, lettered, right, category)
