"""A progress bar for work on the host: live on a terminal, plain lines elsewhere, silent when the work is short."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtrain.text import readable_size

QUIET_SECONDS = 1.0  # shorter work prints nothing, unless on a terminal
LINE_SECONDS = 10.0

Advance = Callable[[int], None]


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show on standard error how many of `total` bytes are done; yield the function to call with each further amount."""
    with _live(title, total) if sys.stderr.isatty() else _lines(title, total) as advance:
        yield advance


@contextmanager
def _live(title: str, total: int) -> Iterator[Advance]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=max(total, 1))
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Advance]:
    start = time.monotonic()
    done, next_line, printed = 0, start + QUIET_SECONDS, False

    def advance(amount: int) -> None:
        nonlocal done, next_line, printed
        done += amount
        now = time.monotonic()
        if now >= next_line:
            share = 100 * done / max(total, 1)
            print(f"{title}: {share:.0f}% of {readable_size(total)}", file=sys.stderr, flush=True)
            next_line, printed = now + LINE_SECONDS, True

    yield advance
    if printed:
        seconds = time.monotonic() - start
        print(f"{title}: done, {readable_size(total)} in {seconds:.1f} s", file=sys.stderr, flush=True)
