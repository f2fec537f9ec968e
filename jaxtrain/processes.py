"""Communicate between the processes of a run without devices: the key-value store and barriers of JAX's runtime.

Process 0 hosts the store. A single process has none: its `post` succeeds, its `look` finds nothing, its barriers return.

Collectives here (`barrier`, `exchange`, `from_first`) must be entered by all processes in the same order, like XLA's. Unlike
XLA's they have a time limit, and the error names the missing process.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtrain.errors import ExplainedError, PeerMissing
from jaxtrain.jax_private import distributed_state
from jaxtrain.text import listed

_PREFIX = "jaxtrain/"
_FAILURE = "failure"
LEAVE_SECONDS = 2.5
"""Seconds that process 0 waits for its peers to end first: jax aborts processes that still run when the store is gone."""
EXIT_GRACE_SECONDS = 0.5
"""Seconds from a process's last message to its end."""
LONG_SECONDS = 24 * 3600.0
"""Time limit for work that may take hours: reading data for the first time, compiling, the last uploads to a store."""
limit_seconds = 1800.0
"""Default limit of a collective; `launch.distributed.start` sets it to distributed.phase_seconds."""


@dataclass(frozen=True)
class Failure:
    """A process's reason to end the run, for its peers."""

    process: int
    code: int
    """Its exit code."""
    reason: str
    """One line."""
    hang: bool = False
    """Whether a watchdog found that it hangs."""


class _Own:
    """This process's state."""

    collectives = 0
    """Number of host collectives entered."""
    deleted = 0
    """Number of collectives whose keys are deleted."""
    failure: Failure | None = None
    """The announced failure."""


_own = _Own()


def _state() -> Any | None:
    """Return jax's record of the processes; None before jax is imported, when there can be no other process."""
    return distributed_state() if "jax" in sys.modules else None


def _client() -> Any | None:
    state = _state()
    return None if state is None else state.client


def are_several() -> bool:
    """Return whether this process is one of a run of several."""
    return _client() is not None and count() > 1


def own_index() -> int:
    """Return this process's index, from 0. Unlike jax.process_index it initialises no device."""
    state = _state()
    return 0 if state is None else int(state.process_id or 0)


def count() -> int:
    """Return the number of processes. Unlike jax.process_count it initialises no device."""
    state = _state()
    return 1 if state is None else int(state.num_processes or 1)


def collectives_entered() -> int:
    """Return the number of collectives that this process has entered: of two processes the one with fewer is behind."""
    return _own.collectives


# ---------------------------------------------------------------------------------------------------------------------
# The key-value store


def post(key: str, value: str) -> bool:
    """Set a key for good; return False if it is already set."""
    client = _client()
    if client is None:
        return True
    try:
        client.key_value_set(_PREFIX + key, value)
    except Exception as error:
        if "ALREADY_EXISTS" in str(error):
            return False
        raise
    return True


def look(key: str) -> str | None:
    """Return the value of a key, or None if it is not set."""
    client = _client()
    if client is None:
        return None
    try:
        return client.key_value_try_get(_PREFIX + key)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def tell(key: str, value: str) -> None:
    """Set a key, replacing its earlier value."""
    client = _client()
    if client is not None:
        client.key_value_set(_PREFIX + key, value, allow_overwrite=True)


def read_folder(folder: str) -> dict[str, str]:
    """{name after the slash: value} of all keys under "folder/"."""
    client = _client()
    if client is None:
        return {}
    prefix = f"{_PREFIX}{folder}/"
    return {key.removeprefix(prefix): value for key, value in client.key_value_dir_get(prefix)}


def wait_for(key: str, seconds: float) -> str:
    """Wait until process 0 has set a key; return its value.

    Raises:
      PeerMissing: it was not set in time.
    """
    client = _client()
    assert client is not None, "a lone process waits for no other"
    try:
        return client.blocking_key_value_get(_PREFIX + key, int(seconds * 1000))
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise PeerMissing(f"process 0 did not come to {key!r} within {seconds:.0f} s; see its log") from error


# ---------------------------------------------------------------------------------------------------------------------
# Collectives of the host


def barrier(name: str, seconds: float) -> None:
    """Wait until all processes have entered the barrier. Each name can be used once.

    Raises:
      PeerMissing: a process did not come in time; names it.
    """
    if are_several():
        _enter()
        _meet(name, "", seconds)


def exchange(name: str, value: Any, seconds: float) -> list[Any]:
    """Return every process's value, by process, after a round trip through JSON. Each name can be used once.

    Process 0 gathers and distributes, so that n processes send O(n) messages.

    Raises:
      PeerMissing: a process did not come in time; names it.
    """
    if not are_several():
        return [json.loads(json.dumps(value))]
    _enter()
    _meet(name, json.dumps(value), seconds)
    if own_index() == 0:
        values = read_folder(f"{name}/of")
        post(f"{name}/all", f"[{','.join(values[str(process)] for process in range(count()))}]")
    return json.loads(wait_for(f"{name}/all", seconds))


def exchange_next(value: Any, seconds: float | None = None) -> list[Any]:
    """Do `exchange` without a name: all processes make the same calls of this and of `from_first` in the same order."""
    name = f"collective/{_own.collectives + 1}"
    values = exchange(name, value, limit_seconds if seconds is None else seconds)
    if are_several() and own_index() == 0:
        _delete_before(_own.collectives)  # all have entered this one, so all have read the earlier ones
    return values


def from_first(value: Any, seconds: float | None = None) -> Any:
    """Return process 0's value in all processes, after a round trip through JSON.

    Raises:
      PeerMissing: process 0 did not come in time.
    """
    if not are_several():
        return value
    _enter()
    key = f"collective/{_own.collectives}/first"
    if own_index() == 0:
        post(key, json.dumps(value))
    return json.loads(wait_for(key, limit_seconds if seconds is None else seconds))


def in_first(work: Callable[[], Any], error: Callable[[str], Exception], seconds: float | None = None) -> Any:
    """Return what `work` returns in process 0, JSON values, in all processes.

    Raises:
      error: in all processes, where it raised an ExplainedError or OSError there.
    """
    found, problem = None, ""
    if own_index() == 0:
        try:
            found = work()
        except (ExplainedError, OSError) as failure:
            problem = str(failure)
    found, problem = from_first((found, problem), seconds)
    if problem:
        raise error(problem)
    return found


def _enter() -> None:
    _own.collectives += 1


def _delete_before(number: int) -> None:
    client = _client()
    for old in range(_own.deleted + 1, number):
        if client is not None:
            client.key_value_delete(f"{_PREFIX}collective/{old}")
    _own.deleted = max(_own.deleted, number - 1)


def _meet(name: str, value: str, seconds: float) -> None:
    client = _client()
    assert client is not None
    post(f"{name}/of/{own_index()}", value)
    try:
        client.wait_at_barrier(_PREFIX + name, int(seconds * 1000))
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        there = {int(process) for process in read_folder(f"{name}/of")}
        missing = [process for process in range(count()) if process not in there]
        raise PeerMissing(f"{name_processes(missing)} did not come to {name!r} within {seconds:.0f} s; see the log") from error


def name_processes(processes: list[int], most: int = 8) -> str:
    """Return "process 3 of 4", or "processes 1, 2 and 5 more of 64"."""
    if not processes:
        return f"a process of {count()}"
    words = [str(process) for process in processes[:most]]
    if len(processes) > most:
        words.append(f"{len(processes) - most} more")
    return f"process{'es' if len(processes) > 1 else ''} {listed(words)} of {count()}"


# ---------------------------------------------------------------------------------------------------------------------
# Ending early


def announce(code: int, reason: str) -> None:
    """Tell the peers that this process ends the run, and why; their `launch.watchdog` then ends them. The first call counts."""
    first = _own.failure or Failure(own_index(), code, " ".join(reason.split())[:600])
    _own.failure = replace(first, process=own_index())  # one that refuses before it has joined learns its number later
    report(_own.failure)


def announced() -> Failure | None:
    """Return this process's announced failure."""
    return _own.failure


def report(failure: Failure) -> None:
    """Post a failure, unless one is posted already. A store that is gone is no error here."""
    if are_several():
        with contextlib.suppress(Exception):
            post(_FAILURE, json.dumps(asdict(failure)))


def reported() -> Failure | None:
    """Return the failure that ends the run, or None."""
    text = look(_FAILURE)
    return None if text is None else Failure(**json.loads(text))


def leave(seconds: float = LEAVE_SECONDS) -> None:
    """Post that this process ends early; process 0, which hosts the store, waits up to `seconds` for its peers' posts."""
    if not are_several():
        return
    with contextlib.suppress(Exception):  # the store may be gone
        post(f"left/{own_index()}", "")
        until = time.monotonic() + seconds
        while own_index() == 0 and time.monotonic() < until:
            if len(read_folder("left")) == count():
                time.sleep(EXIT_GRACE_SECONDS)
                return
            time.sleep(0.05)
