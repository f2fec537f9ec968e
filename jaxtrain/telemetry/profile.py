"""A profiler window: traces the steps FIRST to LAST into run_dir/profile, for XProf and Perfetto.

Only files are written. Nothing listens on a port: no profiler server, and no Perfetto link (which would serve one).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtrain.errors import ConfigError
from jaxtrain.files import Say, log_warning


def parse_window(profile: str) -> tuple[int, int] | None:
    """(FIRST, LAST) from "FIRST:LAST", both inclusive; None from the empty string.

    Raises:
      ConfigError: it is something else, or LAST is before FIRST.
    """
    if not profile:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    if not match:
        raise ConfigError([f"telemetry.profile={profile!r}: give FIRST:LAST step, e.g. 10:13"])
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise ConfigError([f"telemetry.profile={profile!r}: the last step is before the first; use {last}:{first}"])
    return first, last


class ProfileWindow:
    """Traces the steps of telemetry.profile on process 0; does nothing on the others or without a window.

    A run resumed inside the window traces what is left of it; `close` ends a trace that the run ended in.
    """

    def __init__(self, profile: str, run_dir: Path, process_index: int = 0, say: Say = log_warning):
        self._say = say
        self._window = parse_window(profile) if process_index == 0 else None
        self.directory = Path(run_dir) / "profile"
        """Where the trace is written, each time in a folder of its own below plugins/profile."""
        self.tracing = False
        """Whether a trace is being taken now."""

    def on_step(self, step: int, in_flight: Any = None) -> bool:
        """Call just before step number `step` is dispatched. True if this call has written a trace.

        `in_flight` is what the previous steps are still computing (the state, or their metrics): it is waited for where the
        window opens and closes, and only there, so that the trace holds whole steps.
        """
        if self._window is None:
            return False
        first, last = self._window
        if not self.tracing and first <= step <= last:
            jax.block_until_ready(in_flight)
            self._start()
        elif self.tracing and step > last:
            return self.close(in_flight)
        return False

    def close(self, in_flight: Any = None) -> bool:
        """End the trace, if one is being taken; return whether one was written. Safe to call twice, and after an exception."""
        if not self.tracing:
            return False
        self.tracing = False
        self._window = None
        try:
            jax.block_until_ready(in_flight)
        finally:
            written = self._attempt(jax.profiler.stop_trace)
        return written

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call as an event: slows the steps and drowns the trace
        start = functools.partial(jax.profiler.start_trace, create_perfetto_trace=True, profiler_options=options)
        self.tracing = self._attempt(lambda: start(str(self.directory)))

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Start or stop the trace; return whether that worked. Where it did not, say so, and try no other."""
        try:
            work()
        except (OSError, RuntimeError) as error:  # of Python, or of XLA's writer
            self._window = None
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"warning    no profile in {self.directory}: {why}; the run goes on")
            return False
        return True
