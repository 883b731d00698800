"""What all benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums, ratio


class Counting(Benchmark):
    @classmethod
    def read(cls, options: BenchmarkOptions) -> Counting:
        images = ("b.jpg", "a.jpg", "b.jpg", "")
        return cls(
            options=options, questions=tuple(Question(id=str(n), image=i, text="?") for n, i in enumerate(images))
        )

    def score(self, answers: Sequence[str]) -> Scores:
        return Scores((), ())

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {}


def test_ratios_are_elementwise_and_zero_for_nothing() -> None:
    assert ratio([1, 2], [2, 0]).tolist() == [0.5, 0] and float(ratio(1, 4)) == 0.25
    assert ratio(1, [2, 4]).tolist() == [0.5, 0.25]


def test_missing_counts_are_zeros_of_the_others_shape() -> None:
    sums = Sums(a=np.array([1.0, 2.0]))
    assert sums["b"].tolist() == [0, 0] and sums.total(["a", "a", "b"]).tolist() == [2, 4]
    assert Sums()["a"] == 0


def test_restricting_keeps_order_and_questions_without_an_image() -> None:
    benchmark = Counting.read(BenchmarkOptions(type="counting"))
    assert benchmark.images == ("b.jpg", "a.jpg")
    assert [question.id for question in benchmark.restricted(["b.jpg"]).questions] == ["0", "2", "3"]
    assert [question.resampled for question in benchmark.questions] == ["b.jpg", "a.jpg", "b.jpg", "3"]


def test_name_and_length_of_answers() -> None:
    assert Counting.read(BenchmarkOptions(type="counting")).name == "counting"
    named = Counting.read(BenchmarkOptions(type="counting", name="mine", max_new_tokens=7))
    assert (named.name, named.answer_length) == ("mine", 7)
    assert Counting(options=named.options, questions=(), label="md").name == "mine (md)"
    assert Counting(options=BenchmarkOptions(), questions=()).answer_length == 512


def test_suffix_and_paths_of_options() -> None:
    options = BenchmarkOptions(type="counting", images="list.txt")
    assert options.asked("A?") == "A?" and BenchmarkOptions(suffix="B.").asked("A?") == "A? B."
    assert str(options.path("images")) == "list.txt"
    with pytest.raises(ValueError, match="benchmark 'counting': option 'prompt' is empty"):
        options.path("prompt")
