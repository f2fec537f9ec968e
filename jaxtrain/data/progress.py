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
def progress(title: str, total: int, of: str = "") -> Iterator[Advance]:
    """Show on standard error how much of `total` is done; yield the function to call with each further amount.

    Args:
      of: what is counted, "rows"; empty for bytes.
    """
    with _live(title, total, of) if sys.stderr.isatty() else _lines(title, total, of) as advance:
        yield advance


@contextmanager
def _live(title: str, total: int, of: str) -> Iterator[Advance]:
    from rich import progress as rich_progress
    from rich.console import Console

    amounts = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        *((rich_progress.MofNCompleteColumn(), rich_progress.TextColumn(of)) if of else amounts),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=max(total, 1))
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def _lines(title: str, total: int, of: str) -> Iterator[Advance]:
    whole = f"{total:,} {of}" if of else readable_size(total)
    start = time.monotonic()
    done, next_line, printed = 0, start + QUIET_SECONDS, False

    def advance(amount: int) -> None:
        nonlocal done, next_line, printed
        done += amount
        now = time.monotonic()
        if now >= next_line:
            share = 100 * done / max(total, 1)
            print(f"{title}: {share:.0f}% of {whole}", file=sys.stderr, flush=True)
            next_line, printed = now + LINE_SECONDS, True

    yield advance
    if printed:
        seconds = time.monotonic() - start
        print(f"{title}: done, {whole} in {seconds:.1f} s", file=sys.stderr, flush=True)
