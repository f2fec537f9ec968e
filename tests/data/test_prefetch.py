"""The prefetcher keeps order, raises where the error belongs, and leaves no thread."""

import threading

import pytest

from jaxtrain.data.prefetch import Prefetcher


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxtrain-data")]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_threads_end(threads):
    with Prefetcher(lambda n: n * n, 5, depth=4, threads=threads) as batches:
        assert [next(batches) for _ in range(20)] == [n * n for n in range(5, 25)]
        assert data_threads()
    assert not data_threads()
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_no_more_is_made_ahead_than_asked():
    made = []
    with Prefetcher(made.append, 0, depth=3, threads=1) as batches:
        next(batches)
    assert len(made) <= 4


def test_an_error_is_raised_in_its_place_and_ends_the_threads():
    def make(n):
        if n == 2:
            raise ValueError("bad batch")
        return n

    batches = Prefetcher(make, 0, depth=4, threads=2)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="bad batch"):
        next(batches)
    assert not data_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_close_returns_while_work_is_queued():
    release = threading.Event()
    batches = Prefetcher(lambda n: release.wait(10), 0, depth=8, threads=1)
    release.set()
    batches.close()
    assert not data_threads()
