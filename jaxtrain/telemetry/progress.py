"""Show a run while it runs: a live bar on a terminal, one greppable line per logged row elsewhere.

    step 100/1000 | loss 2.345 | 12,345 tokens/s | data wait 0.3% | grad norm 0.81 | lr 3.00e-04 | ETA 1m 04s

All forms have the interface of `Progress`. `advance` only stores a number, so it may be called on every step: the live
bar redraws itself four times a second from its own thread.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxtrain.telemetry.heartbeat import Heartbeat
from jaxtrain.telemetry.run_log import RunLog, stamped
from jaxtrain.text import discard, printable, readable_size

REFRESHES_PER_SECOND = 4
UNKNOWN = "?"
MOST_NAMED = 12
"""Sets, sources and ranges of positions of a validation that its line has."""


class Progress:
    """Shows nothing: the base class, and the form of processes other than 0.

    When the terminal, or the program at the other end of the pipe, is gone, nothing is shown and nothing fails.
    """

    status = ""
    """The work that steps wait for; see `during`."""
    heartbeat: Heartbeat | None = None
    """Gets the status too, for the watchdog and the supervisor."""
    log: RunLog | None = None
    """The file that keeps messages and logged rows."""
    total_steps = 0
    """The last step of the run."""

    @contextmanager
    def during(self, words: str) -> Iterator[None]:
        """Show `words` ("compiling") in place of the ETA while the block runs, which steps wait for."""
        before = self.status
        self.now(words)
        try:
            yield
        finally:
            self.now(before)

    def now(self, words: str) -> None:
        """Set the work that steps wait for from now on; empty for none."""
        self.status = words
        if self.heartbeat is not None:
            self.heartbeat.phase(words)

    def advance(self, step: int) -> None:
        """Record that step number `step` is done."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Log and show a training or validation row, with the names of metrics.jsonl."""
        self.say(describe(row, self.total_steps))

    def say(self, text: str) -> None:
        """Log a message, and print it (above the bar, if there is one)."""
        if self.log is not None:
            self.log.write(text)
        self._show(text)

    def _show(self, text: str) -> None:
        """Print a message."""

    def close(self) -> None:
        """Restore the terminal. Safe to call twice."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_progress(total_steps: int, start_step: int = 0, process_index: int = 0, stream: IO[str] | None = None) -> Progress:
    """Return the live form if `stream` (standard output) is a UTF-8 terminal that can move its cursor, else plain lines.

    Processes other than 0 show nothing.
    """
    if process_index != 0:
        return Progress()
    target: IO[str] = stream or sys.stdout
    console = Console(file=target, highlight=False)
    if (
        target.isatty() and not console.is_dumb_terminal and console.encoding.startswith("utf")
    ):  # the bar's characters are not ASCII
        return LiveProgress(total_steps, start_step, console)
    return PlainProgress(total_steps, target)


class PlainProgress(Progress):
    """One line, with the time, for each logged row and each message."""

    def __init__(self, total_steps: int, stream: IO[str] | None = None):
        self.total_steps, self._stream = total_steps, stream or sys.stdout

    def _show(self, text: str) -> None:
        try:
            print(stamped(printable(text)), file=self._stream, flush=True)
        except BrokenPipeError:
            discard(self._stream)
        except OSError:  # a full disk: the next line may find room again
            pass


class LiveProgress(Progress):
    """A bar with the newest figures under it; validation rows and messages are printed above it and stay."""

    def __init__(self, total_steps: int, start_step: int, console: Console):
        self.total_steps, self._step, self._console = total_steps, start_step, console
        self._training: Mapping[str, Any] = {}
        self._validation: Mapping[str, Any] = {}
        # Live also prints stdout and stderr above the bar, which its thread draws.
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_SECOND, vertical_overflow="crop"
        )
        self._live.start()
        atexit.register(self.close)  # restore the cursor even if the loop never calls close

    def advance(self, step: int) -> None:
        self._step = step

    def update(self, row: Mapping[str, Any]) -> None:
        if is_validation(row):
            self._validation = row
            super().update(row)
        else:
            self._training, self._step = row, max(self._step, row["step"])
            if self.log is not None:
                self.log.write(describe(row, self.total_steps))

    def _show(self, text: str) -> None:
        # As Text, because square brackets in a path or a message are not markup.
        try:
            self._console.print(Text(printable(text)), soft_wrap=True)
        except (OSError, SystemExit):  # rich turns a broken pipe into SystemExit
            discard(self._console.file)

    def close(self) -> None:
        atexit.unregister(self.close)
        try:
            self._live.stop()
        except (OSError, SystemExit):
            discard(self._console.file)

    def _render(self) -> RenderableType:
        share = self._step / max(self.total_steps, 1)
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(ratio=1, min_width=10)
        for _ in range(3):
            line.add_column(justify="right", no_wrap=True)
        line.add_row(
            Bar(self.total_steps, 0, self._step, color="green", bgcolor="grey30"),
            Text(f"{share:4.0%}", style="bold"),
            Text(f"step {self._step:,}/{self.total_steps:,}"),
            Text(self.status or f"ETA {readable_seconds(self._training.get('eta_seconds'))}", style="cyan"),
        )
        newest = {k: self._validation[k] for k in ("validation_bits_per_byte",) if k in self._validation}
        figures = [part for part in figures_of({**self._training, **newest}) if not part.startswith("ETA")]
        lines = fill(figures or ["waiting for the first step"], self._console.width)
        return Group(line, *(Text(text, style="dim", no_wrap=True, overflow="ellipsis") for text in lines))


def is_validation(row: Mapping[str, Any]) -> bool:
    """Return whether a row of metrics.jsonl is of a validation, not of a training step."""
    return "validation_loss" in row or "validation_reward" in row


def describe(row: Mapping[str, Any], total_steps: int) -> str:
    """Return the row as one greppable line: "step 100/1000 | loss 2.345 | ..."."""
    return " | ".join([f"step {row['step']}/{total_steps}", *figures_of(row)])


def figures_of(row: Mapping[str, Any]) -> list[str]:
    """Return the row's figures as texts, most important first, without missing or unknown (None) ones."""
    parts: list[str] = []

    def add(key: str, words: str, scale: float = 1.0) -> None:
        if row.get(key) is not None:
            parts.append(words.format(row[key] * scale))

    add("loss", "loss {:.3f}")
    add("reward", "reward {:.3f}")
    add("validation_loss", "validation loss {:.4f}")
    add("validation_ema_loss", "of the average {:.4f}")
    add("validation_reward", "validation reward {:.3f}")
    add("validation_bits_per_byte", "{:.4f} bits/byte" if is_validation(row) else "validation {:.3f} bits/byte")
    named = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("validation_loss/")}
    shown = [f"{name} {value:.4f}" for name, value in named.items() if "/" not in name]
    parts += shown[:MOST_NAMED] + ([f"{len(shown) - MOST_NAMED} more"] if len(shown) > MOST_NAMED else [])
    add("tokens_per_second", "{:,.0f} tokens/s")
    add("tflops_per_second_per_device_full", "{:,.3g} TFLOP/s/device")
    add("mfu_full", "MFU {:.1f}% full", 100)
    add("mfu_causal", "{:.1f}% causal", 100)
    if row.get("data_wait_seconds") is not None and row.get("step_seconds"):
        parts.append(f"data wait {row['data_wait_seconds'] / row['step_seconds']:.1%}")
    add("grad_norm", "grad norm {:.2f}")
    add("learning_rate", "lr {:.2e}")
    for where in ("device", "host"):
        if row.get(f"{where}_memory_bytes") is not None:
            parts.append(f"{readable_size(row[f'{where}_memory_bytes'])} {where}")
    add("watts", "{:,.0f} W")
    add("joules_per_token", "{:.3g} J/token")
    if row.get("energy_kwh_at_end") is not None:
        parts.append(f"{row['energy_kwh']:.3g} of {row['energy_kwh_at_end']:.3g} kWh")
    if row.get("eta_seconds") is not None:
        parts.append(f"ETA {readable_seconds(row['eta_seconds'])}")
    return parts


def fill(parts: list[str], width: int) -> list[str]:
    """Join the parts with " · " in order into as few lines of at most `width` columns as possible, breaking none."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]} · {part}" if lines else part
        lines[-1:] = [joined] if len(joined) <= width or not lines else [lines[-1], part]
    return lines


def readable_seconds(seconds: float | None) -> str:
    """Return a duration in its two largest units: "3m 20s", "2h 05m", "3d 04h"; "?" for None."""
    if seconds is None:
        return UNKNOWN
    whole = round(seconds)
    for unit, above, below, inner in ((86400, "d", "h", 3600), (3600, "h", "m", 60), (60, "m", "s", 1)):
        if whole >= unit:
            return f"{whole // unit}{above} {whole % unit // inner:02d}{below}"
    return f"{whole}s"
