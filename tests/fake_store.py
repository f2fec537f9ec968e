"""Several processes in one: threads, each with a place of its own in a key-value store that behaves as jax's does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from jaxtrain import processes


class Store:
    """What the clients of all processes share."""

    def __init__(self, count: int):
        self.count, self.values, self.changed = count, {}, threading.Condition()
        self.barriers: dict[str, int] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS: key")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        if key not in self.values:
            raise RuntimeError("NOT_FOUND: key")
        return self.values[key]

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_delete(self, key: str) -> None:
        with self.changed:
            self.values = {k: v for k, v in self.values.items() if k != key and not k.startswith(f"{key}/")}

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: key")
            return self.values[key]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        with self.changed:
            self.barriers[name] = self.barriers.get(name, 0) + 1
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: self.barriers[name] == self.count, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")


class _Own(threading.local, processes._Own):
    """Of each thread."""


def run_as(monkeypatch, count: int, work: Callable[[int], Any], absent: tuple[int, ...] = ()) -> list[Any]:
    """What `work(process)` returns or raises in each of `count` processes; those of `absent` never come."""
    store, place = Store(count), threading.local()
    state = lambda: SimpleNamespace(client=store, process_id=place.process, num_processes=count)  # noqa: E731
    monkeypatch.setattr(processes, "_state", state)
    monkeypatch.setattr(processes, "_own", _Own())
    results: list[Any] = [None] * count

    def be(process: int) -> None:
        place.process = process
        try:
            results[process] = work(process)
        except Exception as error:
            results[process] = error

    threads = [threading.Thread(target=be, args=(process,)) for process in range(count) if process not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
