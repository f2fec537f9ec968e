"""Make batches ahead of the step, in threads that end with the iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")


class Prefetcher(AbstractContextManager[Any], Iterator[T]):
    """Iterates over make(first), make(first + 1), ... without end, in order, with `depth` results made ahead.

    An error in `make` is raised by the `next` that would have given its result, and closes the iterator. `close` (or the end of
    a `with` block) returns when no thread is left.
    """

    def __init__(self, make: Callable[[int], T], first: int, depth: int, threads: int):
        """Start the threads. `depth` and `threads` are at least 1; `make` must be safe to call from several threads."""
        self._make, self._next_index = make, first
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="jaxtrain-data")
        self._pending: deque[Future[T]] = deque()
        """Empty once it is closed."""
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._pending.append(self._executor.submit(self._make, self._next_index))
        self._next_index += 1

    def __next__(self) -> T:
        """Return the next result; StopIteration after `close`."""
        if not self._pending:
            raise StopIteration
        try:
            result = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit()
        return result

    def close(self) -> None:
        """Drop the remaining results, and wait for the threads to end. May be called again."""
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()
