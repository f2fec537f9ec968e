"""Keep the tracebacks of abandoned reads and writes off standard error.

Orbax reads or writes all arrays of a checkpoint at once and gives up at the first failure. The requests still in flight fail
later, in coroutines and threads whose event loop is closed, and Python prints a traceback for each, although one line has
reported the damaged checkpoint or the full disk, and the run goes on.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from traceback import walk_tb
from types import TracebackType
from typing import Any

_LOOP = re.compile(r"uvloop/loop\.pyx$|asyncio/base_events\.py$")


@contextlib.contextmanager
def abandoned_io_unsaid() -> Iterator[None]:
    """Drop the tracebacks of requests that Orbax has abandoned, and no others; after an exception inside, for good."""
    before, asyncio = sys.unraisablehook, logging.getLogger("asyncio")
    if getattr(before, "__module__", "") == __name__:  # nested, or kept after a failure
        yield
        return

    def unraisable(found: Any) -> None:
        if not (_is_orbax(found.object) or _is_closed_loop(found.exc_value, found.exc_traceback)):
            before(found)

    asyncio.addFilter(_is_no_abandoned_task)
    sys.unraisablehook = unraisable
    yield
    sys.unraisablehook = before
    asyncio.removeFilter(_is_no_abandoned_task)


def _is_orbax(found: object) -> bool:
    """Return whether a coroutine is one of Orbax's."""
    return inspect.iscoroutine(found) and "/orbax/" in found.cr_code.co_filename


def _is_closed_loop(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Return whether TensorStore called a closed event loop: the traceback holds nothing but the loop's own code."""
    outermost = trace.tb_frame.f_code.co_filename if trace is not None else ""
    return str(error) == "Event loop is closed" and _LOOP.search(outermost) is not None


def _is_no_abandoned_task(record: logging.LogRecord) -> bool:
    text, trace = record.getMessage(), record.exc_info[2] if record.exc_info else None
    unread = re.match(r"\w+ exception was never retrieved|Task was destroyed but it is pending", text)
    return not (unread and ("/orbax/" in text or any("/orbax/" in f.f_code.co_filename for f, _ in walk_tb(trace))))
