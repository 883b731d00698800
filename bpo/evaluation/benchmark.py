"""What a benchmark is: questions about images, and counts from which its metrics follow.

Every metric is a function of sums of counts over *units*, the things that were drawn independently (usually images).
Intervals and paired comparisons then resample units and never need to know the benchmark (`intervals.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bpo.config.options import Section, number

if TYPE_CHECKING:
    from typing_extensions import Self

YES_NO = ("Yes", "No")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about an image.

    Attributes:
        id: Unique within its benchmark.
        image: Path relative to data.image_root; empty asks without an image.
        text: The complete prompt.
        unit: What is resampled for intervals; empty uses the image.
        labels: The answers to choose from, such as `YES_NO`, for decoding that compares labels; empty for free text.
    """

    id: str
    image: str
    text: str
    unit: str = ""
    labels: tuple[str, ...] = ()

    @property
    def resampled(self) -> str:
        return self.unit or self.image or self.id

    def item(self, answer: str, **read: Any) -> dict[str, Any]:
        """An item of `Scores`: the question, its answer, and how the answer was read."""
        return {"id": self.id, "image": self.image, "question": self.text, "answer": answer, **read}


@dataclass(frozen=True, slots=True)
class Scores:
    """What the answers of a benchmark amount to.

    Attributes:
        rows: (unit, counts by name); counts of rows with the same unit add up, a count that a row lacks is 0.
        items: JSON objects, one per question in order: `id`, `image`, `question`, `answer`, and how it was read.
    """

    rows: tuple[tuple[str, Mapping[str, float]], ...]
    items: tuple[dict[str, Any], ...]


class Sums(dict[str, np.ndarray]):
    """Sums of counts by name, of equal shapes; a name that no row has is 0."""

    def __missing__(self, name: str) -> np.ndarray:
        return np.zeros(np.shape(next(iter(self.values()), 0.0)))

    def total(self, names: Iterable[str]) -> np.ndarray:
        """Sum of the counts with these names."""
        return sum((self[name] for name in names), np.zeros(()))


@dataclass(kw_only=True)
class BenchmarkOptions(Section):
    """Options that every benchmark of a suite has.

    Attributes:
        type: Name of the benchmark's class in `registry.BENCHMARKS`.
        name: Its name in results; empty uses the type. Must be unique in the suite.
        images: File with one image path per line; only questions about these are asked. Empty asks about all.
        sample: Number of images to draw from those of the benchmark; 0 takes all.
        seed: Seed of the draw.
        prompt: Replaces the benchmark's own prompt, where it has one; empty uses that of the literature.
        suffix: Appended to each question after a space, such as "Answer the question using a single word or phrase.".
        max_new_tokens: Maximum number of tokens per answer; 0 uses the benchmark's own.
    """

    where = "suite"

    type: str = ""
    name: str = ""
    images: str = ""
    sample: int = number(0, at_least=0, zero="all")
    seed: int = number(0, at_least=0)
    prompt: str = ""
    suffix: str = ""
    max_new_tokens: int = number(0, at_least=1, zero="the benchmark's own")

    def asked(self, text: str) -> str:
        """The question with the suffix."""
        return f"{text} {self.suffix}" if self.suffix else text

    def path(self, option: str) -> Path:
        """The value of an option that must name a file or folder.

        Raises:
            ValueError: It is empty.
        """
        value = getattr(self, option)
        if not value:
            raise ValueError(f"benchmark {self.name or self.type!r}: option {option!r} is empty; give it a path")
        return Path(value)


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """Questions with their ground truth; subclasses add what scoring needs, by question id.

    Attributes:
        options: As given in the suite.
        questions: In the order of the files.
        files: Paths of all files that were read, for fingerprints.
        label: Part of the result's name that says what it depends on, such as the spaCy model; usually empty.
    """

    Options: ClassVar[type[BenchmarkOptions]] = BenchmarkOptions
    max_new_tokens: ClassVar[int] = 512
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    # Whether the files are about the answers of one model, so that those of two models differ.
    files_follow_answers: ClassVar[bool] = False
    not_fractions: ClassVar[frozenset[str]] = frozenset()  # metrics that tables do not show in percent

    options: BenchmarkOptions
    questions: tuple[Question, ...]
    files: tuple[str, ...] = ()
    label: str = ""

    @classmethod
    @abstractmethod
    def read(cls, options: Any) -> Self:
        """Reads the benchmark's files.

        Raises:
            ValueError: A file is missing or has another form; names file, record, field and fix.
        """

    @abstractmethod
    def score(self, answers: Sequence[str]) -> Scores:
        """Scores one answer per question, in order."""

    @staticmethod
    @abstractmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        """Metrics as fractions (or as the literature gives them), elementwise over the arrays in `sums`."""

    def answer_file(self, answers: Sequence[str]) -> tuple[str, str] | None:
        """(file suffix, content) of the answers in the form that the official scorer reads; None if there is none."""
        return None

    @property
    def name(self) -> str:
        base = self.options.name or self.options.type
        return f"{base} ({self.label})" if self.label else base

    @property
    def answer_length(self) -> int:
        """Maximum number of new tokens of an answer."""
        return self.options.max_new_tokens or self.max_new_tokens

    @property
    def images(self) -> tuple[str, ...]:
        """Every image once, in the order of the questions."""
        return tuple(dict.fromkeys(q.image for q in self.questions if q.image))

    def restricted(self, images: Sequence[str]) -> Self:
        """The benchmark with only the questions about these images; questions without an image stay."""
        kept = {*images, ""}
        return replace(self, questions=tuple(q for q in self.questions if q.image in kept))


def ratio(part: Any, whole: Any) -> np.ndarray:
    """part / whole elementwise, 0 where whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole != 0)
