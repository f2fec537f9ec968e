"""Copies of checkpoints in an object store: what comes back, when nothing does, and what a failing store costs."""

import contextlib
import importlib.util
import shutil
from dataclasses import replace

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxtrain.checkpoint import COMMIT_MARK, Checkpoints, committed_steps
from jaxtrain.checkpoint.mirror import UNDONE_MARK, Mirror
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError


def state_of(step):
    return {"w": jnp.arange(300, dtype=jnp.float32) * step, "step": jnp.int32(step)}


ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[0])), state_of(0)
)


@pytest.fixture(params=["memory", "file"])
def config(request, tmp_path):
    """Of a run that keeps two steps, with a store of its own."""
    place = f"/{tmp_path.name}/run" if request.param == "memory" else tmp_path / "store" / "run"
    return CheckpointConfig(keep=2, mirror=f"{request.param}://{place}/")


def save(folder, config, *steps):
    with Checkpoints(folder, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {}, wait=True)


def in_store(config, folder="anywhere"):
    return Mirror(folder, config).steps()


def restored(folder, config):
    """The number of the step that a start goes on from; its arrays are those of that step."""
    with Checkpoints(folder, config) as checkpoints:
        found = checkpoints.restore_newest(ABSTRACT, lambda step, metadata: None)
        if found is None:
            return None
        np.testing.assert_array_equal(found[1]["w"], state_of(found[0])["w"])
        return found[0]


@contextlib.contextmanager
def failing(config, method):
    """One of the store's methods fails."""

    def fail(*arguments, **more):
        raise ConnectionError("the store is away")

    store = type(fsspec.url_to_fs(config.mirror)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, method, fail)
        yield


def unreachable(config):
    """Nothing can be written there."""
    return failing(config, "put")


def test_a_lost_folder_comes_back_from_the_newest_copy(tmp_path, config, caplog):
    for step in (1, 2, 3):
        save(tmp_path / "run", config, step)  # which waits for the copy
    assert in_store(config) == [2, 3]
    shutil.rmtree(tmp_path / "run")
    assert restored(tmp_path / "run", config) == 3
    assert "held no checkpoint; step 3 was fetched from" in caplog.text
    assert committed_steps(tmp_path / "run") == [3]
    save(tmp_path / "run", config, 4)
    assert in_store(config) == [3, 4]


def test_copies_of_another_run_are_neither_fetched_nor_touched(tmp_path, config):
    save(tmp_path / "run", config, 5)
    save(tmp_path / "other", replace(config, mirror=""), 2)
    for folder, resume in (("other", "auto"), ("third", "never")):
        with pytest.raises(CheckpointError, match="holds the copies of another run than .*; give another URL"):
            Checkpoints(tmp_path / folder, replace(config, resume=resume))
    assert in_store(config) == [5]
    save(tmp_path / "run", config, 6)
    assert in_store(config) == [5, 6]


def test_a_store_that_was_away_at_the_start_is_still_not_taken_from_another_run(tmp_path, config, caplog):
    save(tmp_path / "run", config, 5)
    save(tmp_path / "other", replace(config, mirror=""), 2)
    with failing(config, "exists"), pytest.raises(CheckpointError, match="cannot be reached: .*the store is away"):
        Checkpoints(tmp_path / "empty", config)
    with failing(config, "exists"):
        checkpoints = Checkpoints(tmp_path / "other", config)
    assert "cannot be reached: ConnectionError: the store is away" in caplog.text
    with pytest.raises(CheckpointError, match="copies of another run"), checkpoints:
        checkpoints.save(3, state_of(3), {}, wait=True)
    assert in_store(config) == [5]


def test_a_copy_without_its_mark_counts_for_none(tmp_path, config):
    save(tmp_path / "run", config, 1)
    save(tmp_path / "run", config, 2)
    store, root = fsspec.url_to_fs(config.mirror)
    store.rm_file(f"{root}/2/{COMMIT_MARK}")
    shutil.rmtree(tmp_path / "run")
    assert restored(tmp_path / "run", config) == 1
    save(tmp_path / "run", config, 2)
    assert in_store(config) == [1, 2]


def test_a_store_that_is_away_costs_copies_and_not_the_run(tmp_path, config, caplog):
    with unreachable(config):
        with pytest.raises(CheckpointError, match="step 2 could not be copied to .*the store is away"):
            save(tmp_path / "run", config, 1, 2)
        assert "step 1 could not be copied" in caplog.text
    assert committed_steps(tmp_path / "run") == [1, 2]
    assert in_store(config) == []
    with Checkpoints(tmp_path / "run", config):
        pass  # the next start copies what lacks
    assert in_store(config) == [2]


def test_who_is_stopped_does_not_wait_for_the_store(tmp_path, config):
    with unreachable(config), Checkpoints(tmp_path / "run", config) as checkpoints:
        checkpoints.save(1, state_of(1), {}, wait=True)
        checkpoints.leave_the_mirror()

    def fall():
        with Checkpoints(tmp_path / "run", config) as checkpoints:
            checkpoints.save(2, state_of(2), {}, wait=True)
            raise ZeroDivisionError

    with unreachable(config), pytest.raises(ZeroDivisionError):
        fall()
    assert committed_steps(tmp_path / "run") == [1, 2]


def test_after_a_rollback_undone_steps_do_not_come_back(tmp_path, config):
    config = replace(config, keep=9)
    for step in (2, 4, 6):
        save(tmp_path / "run", config, step)
    with Checkpoints(tmp_path / "run", config) as checkpoints:
        checkpoints.set_aside_after(2, "rolled back")
        checkpoints.save(4, jax.tree.map(lambda x: x + 1, state_of(4)), {}, wait=True)
    assert in_store(config) == [2, 4]
    store, root = fsspec.url_to_fs(config.mirror)
    assert store.exists(f"{root}/6/{UNDONE_MARK}")
    assert store.cat_file(f"{root}/4/{COMMIT_MARK}") == (tmp_path / "run" / "4" / COMMIT_MARK).read_bytes()


def test_what_comes_damaged_is_not_trained_on(tmp_path, config):
    save(tmp_path / "run", config, 1)
    shutil.rmtree(tmp_path / "run")
    store, root = fsspec.url_to_fs(config.mirror)
    largest = max((path for path in store.find(root) if "/d/" in path), key=store.size)
    data = bytearray(store.cat_file(largest))
    data[len(data) // 2] ^= 1
    store.pipe_file(largest, bytes(data))
    with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged"):
        restored(tmp_path / "run", config)


@pytest.mark.parametrize("name", ["../../outside", "/outside"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, config, monkeypatch, name):
    save(tmp_path / "run", config, 1)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(Mirror, "_folders", lambda self: {"1": {COMMIT_MARK: 1, name: 1}})
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        restored(tmp_path / "run", config)


@pytest.mark.parametrize(
    ("url", "words"), [("nowhere://x", "Protocol not known: nowhere"), ("s3://bucket/run", "(?i)install s3fs")]
)
def test_a_store_that_cannot_be_spoken_to_is_told_at_the_start(tmp_path, url, words):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(CheckpointError, match=words):
        Checkpoints(tmp_path, CheckpointConfig(mirror=url))


def test_s3(tmp_path, monkeypatch):
    """Against a server of moto's on the loopback."""
    server = pytest.importorskip("moto.server", reason='needs `pip install "moto[server]" s3fs`').ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        config = CheckpointConfig(keep=2, mirror="s3://bucket/some/run")
        save(tmp_path / "run", config, 1, 2, 3)
        assert in_store(config)[-1] == 3  # of steps that wait the newest goes first
        shutil.rmtree(tmp_path / "run")
        assert restored(tmp_path / "run", config) == 3
        save(tmp_path / "run", config, 6)
        with Checkpoints(tmp_path / "run", config) as checkpoints:
            checkpoints.set_aside_after(3, "rolled back")
            checkpoints.save(5, state_of(5), {}, wait=True)
        assert in_store(config) == [3, 5]
    finally:
        server.stop()


def test_a_run_that_goes_back_takes_its_mirror_along(tmp_path, config):
    """A folder lost after the return comes back at the step gone back to, not at a later one; later copies stay, unmarked."""
    save(tmp_path / "run", replace(config, keep=9), 1, 2, 3)
    with Checkpoints(tmp_path / "run", replace(config, keep=9, resume="1")) as checkpoints:
        step, _ = checkpoints.restore_chosen(checkpoints.directory, 1, ABSTRACT, lambda step, metadata: None)
        for later in (2, 3):
            (tmp_path / "run" / str(later)).rename(tmp_path / f"branch-{later}")
        checkpoints.went_back_to(step)
    assert in_store(config) == [1]
    shutil.rmtree(tmp_path / "run")
    assert restored(tmp_path / "run", config) == 1
