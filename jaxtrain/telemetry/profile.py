"""Trace the steps FIRST to LAST into run_dir/profile, for XProf and Perfetto.

Only files are written. Nothing listens on a port: no profiler server, and no Perfetto link (which would serve one).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtrain.files import Say, log_warning


class ProfileWindow:
    """Traces the steps of telemetry.profile on process 0; does nothing on the others or without a window.

    A run resumed inside the window traces the rest of it; `close` ends a trace that is still open at the end of the run.
    """

    def __init__(self, profile: str, run_dir: Path, process_index: int = 0, say: Say = log_warning):
        self._say = say
        first, _, last = profile.partition(":")
        self._window = (int(first), int(last)) if profile and process_index == 0 else None
        self.directory = Path(run_dir) / "profile"
        """Folder of the traces, each in a folder of its own below plugins/profile."""
        self.tracing = False
        """Return whether a trace is open."""

    def on_step(self, step: int, in_flight: Any = None) -> bool:
        """Start or stop the trace; call it just before `step` is dispatched. Return whether this call has written a trace.

        `in_flight` is what the previous steps are still computing (the state, or their metrics). It is waited for only where
        the window opens and closes, so that the trace holds whole steps.
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
        """End an open trace; return whether one was written. Safe to call twice, and after an exception."""
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
        options.python_tracer_level = 0  # tracing every Python call slows the steps and hides the other events
        start = functools.partial(jax.profiler.start_trace, create_perfetto_trace=True, profiler_options=options)
        self.tracing = self._attempt(lambda: start(str(self.directory)))

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Start or stop the trace; return whether that worked. After a failure, report it and trace no more."""
        try:
            work()
        except (OSError, RuntimeError) as error:  # OSError from Python, RuntimeError from XLA's writer
            self._window = None
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"warning    no profile in {self.directory}: {why}; the run goes on")
            return False
        return True
