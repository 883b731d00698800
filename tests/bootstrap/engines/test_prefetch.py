"""The next batch is prepared while this one is answered."""

from __future__ import annotations

import threading

import pytest
import torch

from bpo.bootstrap.engines.prefetch import Prefetcher


def test_the_next_batch_and_no_further_one_is_prepared_meanwhile() -> None:
    prepared = [threading.Event() for _ in range(4)]
    batches = ((n, f"batch {n}", [prepared[n].set, lambda: threading.current_thread().name]) for n in range(4))
    with Prefetcher(2) as prefetcher:
        for number, batch, (_, thread) in prefetcher.of(batches):
            assert batch == f"batch {number}" and thread.startswith("prepare")
            if number < 3:
                assert prepared[number + 1].wait(10)
            assert not any(event.is_set() for event in prepared[number + 2 :])


def test_results_are_those_of_each_batch_in_order_with_and_without_threads() -> None:
    def batches():
        return ((n, n, [lambda n=n, i=i: (n, i) for i in range(n)]) for n in range(5))

    for threads in (0, 1, 3):
        with Prefetcher(threads) as prefetcher:
            found = [results for _, _, results in prefetcher.of(batches())]
            assert found == [[(n, i) for i in range(n)] for n in range(5)]


def test_an_error_reaches_the_caller_at_its_batch() -> None:
    def fail() -> None:
        raise KeyError("second")

    with Prefetcher(1) as prefetcher:
        batches = prefetcher.of((n, n, [fail] if n == 1 else []) for n in range(3))
        assert next(batches)[0] == 0
        with pytest.raises(KeyError, match="second"):
            next(batches)


def test_preparing_leaves_the_callers_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    with Prefetcher(1) as prefetcher:
        assert list(prefetcher.of([(0, 0, [torch.get_num_threads])])) == [(0, 0, [1])]
    assert torch.get_num_threads() == before
