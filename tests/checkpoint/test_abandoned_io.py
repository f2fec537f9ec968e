"""A damaged checkpoint or a full disk is told in one line: reads and writes under way leave no tracebacks, and nothing else is
hidden.
"""

import asyncio
import errno
import logging
import subprocess
import sys
import types

import jax
import pytest

from jaxtrain.checkpoint import saving, writing
from jaxtrain.checkpoint.abandoned_io import abandoned_io_unsaid
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError


def coroutine_of(file):
    """A coroutine whose code is in that file."""
    names = {}
    exec(compile("async def read(): pass", file, "exec"), names)  # noqa: S102
    return names["read"]()


def raised_in(file):
    """An exception whose traceback passes through that file."""
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("1 / 0", file, "exec"))  # noqa: S102
    return caught.value


def closed_loop_error():
    """What a thread of C++ meets that calls a closed loop: its traceback begins in the loop."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as caught:
        loop.call_soon_threadsafe(print)
    return caught.value


def test_what_orbax_abandons_is_dropped_and_nothing_else(monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(found.exc_value))

    def report(error, trace=None, coroutine=None):
        found = types.SimpleNamespace(object=coroutine, exc_value=error, exc_traceback=trace)
        sys.unraisablehook(found)  # pyright: ignore[reportArgumentType]
        if coroutine is not None:
            coroutine.close()

    with abandoned_io_unsaid():
        pass
    report(ours := ValueError("nothing failed, so nothing is dropped"), coroutine=coroutine_of("/site/orbax/read.py"))
    assert shown == [ours]
    task = logging.getLogger("asyncio")
    with pytest.raises(ValueError, match="damaged"), abandoned_io_unsaid():
        raise ValueError("damaged")
    closed = closed_loop_error()
    report(ValueError("a read"), coroutine=coroutine_of("/site/orbax/read.py"))
    report(closed, closed.__traceback__.tb_next)
    for unread in ("Task exception was never retrieved", "Task was destroyed but it is pending!"):
        task.error(f"{unread}\nfuture: <Task coro=<read() defined at /site/orbax/read.py:1>>")
    task.error("_GatheringFuture exception was never retrieved", exc_info=raised_in("/site/orbax/read.py"))
    assert shown == [ours]
    assert caplog.text == ""
    report(other := ValueError("another coroutine"), coroutine=coroutine_of("/site/jaxtrain/other.py"))
    report(closed, closed.__traceback__)  # called from our own code
    task.error("Task exception was never retrieved\nfuture: <Task coro=<other() defined at /site/jaxtrain/other.py:1>>")
    task.error("_GatheringFuture exception was never retrieved", exc_info=raised_in("/site/jaxtrain/other.py"))
    assert shown == [ours, other, closed]
    assert caplog.text.count("never retrieved") == 2
    for check in tuple(task.filters):
        task.removeFilter(check)


def test_a_save_that_fails_leaves_no_traceback(tmp_path, monkeypatch):
    """On a full disk the first write fails, and the other ones call a loop that is closed."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(found.exc_value))
    closed = closed_loop_error()

    class Failing:
        def result(self):
            found = types.SimpleNamespace(object=None, exc_value=closed, exc_traceback=closed.__traceback__.tb_next)
            sys.unraisablehook(found)  # pyright: ignore[reportArgumentType]
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.ocp, "save_async", lambda *_, **__: Failing())
    with writing.Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for step in (1, 2):
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoints.save(step, {"a": jax.numpy.ones(3)}, {}, wait=True)
        assert shown == []
        checkpoints._saves.failure = None
    for check in tuple(logging.getLogger("asyncio").filters):
        logging.getLogger("asyncio").removeFilter(check)


DAMAGE = """
import random, shutil, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import CheckpointConfig
from tests.checkpoint.damage import damage
folder, copy = Path(sys.argv[1]), Path(sys.argv[1] + "-copy")
state = lambda n: {"a": [jnp.arange(5000.0) + n + i for i in range(30)], "b": {"c": jnp.ones((64, 64)) * n, "s": jnp.int32(n)}}
with Checkpoints(folder, CheckpointConfig()) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step), {"config": {}}, wait=True)
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
shutil.copytree(folder / "2", copy)
for seed in range(60):
    for path in folder.glob("2*"):
        shutil.rmtree(path)
    shutil.copytree(copy, folder / "2")
    damage(folder / "2", random.Random(seed))
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_newest(abstract, lambda *_: None)[0] in (1, 2)
"""


@pytest.mark.slow
def test_sixty_damages_leave_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, "-c", DAMAGE, str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
