"""The order of the tests among pytest's workers: files that take minutes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

LONG = (
    "train/test_layout_invariance.py",
    "faults/test_faults.py",
    "launch/test_processes.py",
    "train/test_run.py",
    "train/test_moe.py",
    "planner/test_formulas.py",
    "verbs/test_train.py",
    "train/test_bad_steps.py",
    "test_python_pages.py",
    "checkpoint/test_fast.py",
    "train/test_replay.py",
    "faults/test_full_disk.py",
)
"""Files whose tests take longest, the longest first."""

T = TypeVar("T")


def dealt(tests: Sequence[T], file_of: Callable[[T], str], workers: int) -> list[T]:
    """Return the tests so that each of `workers` equal parts begins with its share of LONG; a file's tests stay together.

    With `--dist worksteal` a worker begins with such a part, and then takes what others have last; but never their last two.
    Were those long, one worker would end alone.
    """
    rest = [test for test in tests if file_of(test) not in LONG]
    order, size = [], -(-len(tests) // workers)
    for worker in range(workers):
        long = [test for file in LONG[worker::workers] for test in tests if file_of(test) == file]
        order += long + rest[: max(size - len(long), 0)]
        del rest[: max(size - len(long), 0)]
    return order + rest
