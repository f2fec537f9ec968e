"""Eight fake CPU devices for every test; with JAXTRAIN_TEST_PLATFORM=cuda real ones, for the tests marked gpu."""

import errno
import gc
import os
from pathlib import Path

import pytest

from tests.order import dealt
from tests.quick import fake_devices

platform = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
if platform == "cpu":
    fake_devices(8)
else:
    os.environ["JAX_PLATFORMS"] = platform
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# jax makes millions of objects that live long: with Python's own limit of 700 new ones a sixth of the time of a trace is spent
# looking for cycles among them.
gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(trylast=True)  # what is left out is gone by then
def pytest_collection_modifyitems(items):
    """Have every worker begin with long tests."""
    tests, workers = Path(__file__).parent, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = dealt(items, lambda item: item.path.relative_to(tests).as_posix(), workers)


def pytest_runtest_setup(item):
    """Skip what compiles for GPUs where their compiler is not installed."""
    if item.get_closest_marker("plan"):
        from jaxtrain.planner.deviceless import has_plugin

        if not has_plugin():
            pytest.skip('needs XLA\'s compiler for NVIDIA GPUs: pip install "jaxtrain[plan]"')


def pytest_make_parametrize_id(val, argname):
    """No bytes in a test's name: those of a gzip member carry the time, so two workers would collect other names."""
    return argname if isinstance(val, bytes) else None


ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EFBIG)


@pytest.fixture(params=ERRNOS, ids=errno.errorcode.get)
def disk(request, monkeypatch):
    """A disk that takes `disk.room` more bytes from os.write and from new files, and then fails with one of the errors."""

    class Disk:
        room = 1 << 30

        def fail(self):
            raise OSError(request.param, os.strerror(request.param))

    state, write = Disk(), os.write

    def short_write(descriptor, data):
        if not state.room:
            state.fail()
        count = write(descriptor, bytes(data[: state.room]))
        state.room -= count
        return count

    def write_bytes(path, data):
        with open(path, "wb", buffering=0) as file:
            file.write(data[: state.room])
        if len(data) > state.room:
            state.fail()
        return len(data)

    monkeypatch.setattr(os, "write", short_write)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    return state
