"""Checkpoints: exact on any mesh, committed whole or not at all, and no failure that stays silent."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxtrain import checkpoint
from jaxtrain.checkpoint import Checkpoints, check_same_run, committed_steps, differences, saving
from jaxtrain.checkpoint.checksums import block_checksum, checksums, total
from jaxtrain.config import CheckpointConfig, Config, DataSource, RopeScaling
from jaxtrain.errors import CheckpointError, DamagedCheckpoint
from tests import quick
from tests.checkpoint.damage import damage

# TensorStore finishes the other writes of a failed save after Orbax has closed its event loop: noise, nothing is lost
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = CheckpointConfig(every=1, keep=3)
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def mesh(*shape):
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(shape)])


def sharding_of(leaf, on):
    return NamedSharding(on, P(None, "fsdp", "tensor") if leaf.ndim == 3 else P("fsdp") if leaf.ndim == 1 else P())


def make_state(on, seed=0, layers=6):
    """[layers, D, F] kernels in float32 and bfloat16, a bias, Adam's moments and count, the step: random bits in all."""
    random_numbers = np.random.default_rng(seed)
    params = {
        "layers": {
            "kernel": jax.ShapeDtypeStruct((layers, 8, 16), jnp.float32),
            "gate": jax.ShapeDtypeStruct((layers, 16, 8), jnp.bfloat16),
        },
        "bias": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    shapes = {"params": params, "optimizer": jax.eval_shape(ADAM.init, params), "step": jax.ShapeDtypeStruct((), jnp.int32)}

    def leaf(shape):
        values = 100 * random_numbers.standard_normal(shape.shape)
        return jax.device_put(np.asarray(values).astype(shape.dtype), sharding_of(shape, on))

    return jax.tree.map(leaf, shapes)


def abstract(state, on=None):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if on is None else sharding_of(x, on))

    return jax.tree.map(leaf, state)


def bits(state):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), state)


@pytest.fixture(scope="module")
def state():
    return make_state(mesh(4, 2))


@contextlib.contextmanager
def full_disk():
    """Files end at 512 bytes: writes fail as on a full disk, for root too."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


# ---------------------------------------------------------------------------------------------------------------------
# What is saved comes back


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1), (1, 2), (1, 1)], ids=str)
def test_restores_bit_for_bit_onto_another_mesh(tmp_path, state, shape):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(7, state, {}, wait=True)
    onto = abstract(state, mesh(*shape))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 7
        restored = checkpoints.restore(7, onto)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(onto), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)  # scalars too: Adam's count, the step
        assert got.committed
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree))(restored)  # one program takes them all


def test_disk_holds_plain_names_and_no_optax_classes(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {})
    plain = {"params": state["params"], "step": state["step"]}
    adam = state["optimizer"][1][0]
    plain["optimizer"] = {"1": {"0": {"count": adam.count, "mu": adam.mu, "nu": adam.nu}}}
    restored = checkpoint.restore(tmp_path, 1, abstract(plain))
    assert bits(restored) == bits(plain)


def test_buffers_may_be_donated_right_after_an_asynchronous_save(tmp_path):
    placed = NamedSharding(mesh(4, 2), P("fsdp"))
    first = {f"w{i}": jax.device_put(jnp.full((1 << 18,), float(i)), placed) for i in range(8)}
    expected = bits(first)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1e6, tree), donate_argnums=0)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in range(1, 4):
            live = jax.tree.map(jnp.copy, first)
            checkpoints.save(step, live, {})
            for _ in range(4):
                live = overwrite(live)
            jax.block_until_ready(live)
    for step in (1, 2, 3):
        assert bits(checkpoint.restore(tmp_path, step, abstract(first))) == expected


def test_metadata_comes_back(tmp_path, state):
    metadata = {
        "config": dataclasses.asdict(Config()),
        "data_fingerprint": "é12",
        "versions": {"jax": jax.__version__},
        "num_parameters": 6_738_415_616,
        "validation_bytes": None,
        "values": [1.5, True, {"nested": [None]}],
    }
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, metadata, wait=True)
        assert checkpoints.read_metadata(1) == json.loads(json.dumps(metadata))
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(2, state, {"x": object()})
    (tmp_path / "1").rename(tmp_path / "9")
    with pytest.raises(CheckpointError, match="holds step 1, not 9"):
        checkpoint.read_metadata(tmp_path, 9)
    (tmp_path / "9" / checkpoint.METADATA_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_metadata(tmp_path, 9)


# ---------------------------------------------------------------------------------------------------------------------
# Restore is strict


def without_bias(state):
    return {**state, "params": {"layers": state["params"]["layers"]}}


def with_extra(state):
    return {**state, "params": {**state["params"], "head": state["params"]["bias"]}}


def with_sgd(state):
    return {**state, "optimizer": optax.sgd(0.1, momentum=0.9).init(state["params"])}


def in_bfloat16(state):
    return {**state, "params": {**state["params"], "bias": state["params"]["bias"].astype(jnp.bfloat16)}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_bias, ["params/bias is float32[16] in the checkpoint; this run has no such array"]),
        (with_extra, ["params/head is not in the checkpoint; this run has float32[16]"]),
        (with_sgd, ["optimizer/0/trace/bias is not in", "optimizer/1/0/mu/bias is float32[16] in the checkpoint"]),
        (in_bfloat16, ["params/bias is float32[16] in the checkpoint, bfloat16[16] in this run"]),
        (lambda _: make_state(mesh(4, 2), layers=12), ["kernel is float32[6,8,16] in the checkpoint, float32[12,8,16]"]),
    ],
    ids=["extra on disk", "missing on disk", "other optimizer", "other dtype", "other shape"],
)
def test_restore_names_every_leaf_that_differs(tmp_path, state, change, words):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path, 1, abstract(change(state)))
    for word in words:
        assert word in str(caught.value)


def test_restore_refuses_a_leaf_without_sharding(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {})
    with pytest.raises(TypeError, match="has no sharding"):
        checkpoint.restore(tmp_path, 1, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))


def test_restore_of_damaged_or_missing_data_gives_the_cause(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {})
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 .* it holds steps 1"):
        checkpoint.restore(tmp_path, 5, abstract(state))
    for data in (tmp_path / "1" / "state").glob("**/d/*"):
        data.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.restore(tmp_path, 1, abstract(state))


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_save_refuses_keys_that_could_collide_on_disk(tmp_path, key):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(ValueError, match="keys must be distinct"):
            checkpoints.save(1, {key: jnp.zeros(4)}, {})
        checkpoints.save(1, {"k": [jnp.zeros(4)], "0": jnp.ones(4)}, {})  # the same word at two depths is no collision


def test_save_refuses_leaves_that_are_not_arrays(tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(TypeError, match="state leaf step is a int"):
        checkpoints.save(1, {"step": 3}, {})


# ---------------------------------------------------------------------------------------------------------------------
# Whatever happens to the files, what comes back is exact


def accept(step, metadata):
    """Any run's checkpoint."""


def save_three(folder, state):
    """Steps 1, 2 and 3 of states that differ; returns their bits by step."""
    states = {step: {**state, "step": jnp.int32(step)} for step in (1, 2, 3)}
    with Checkpoints(folder, CONFIG) as checkpoints:
        for step, saved in states.items():
            checkpoints.save(step, saved, {"step": step})
    return {step: bits(saved) for step, saved in states.items()}


def test_any_damage_gives_an_exact_older_state(tmp_path, state, caplog):
    """JAXTRAIN_TEST_FLIPS=200 is the measured bar: 200 exact states, none wrong."""
    trials, chance = int(os.environ.get("JAXTRAIN_TEST_FLIPS", "12")), random.Random(3)
    exact, like = save_three(tmp_path / "whole", state), abstract({**state, "step": jnp.int32(0)})
    newest = 0
    for trial in range(trials):
        folder = tmp_path / f"{trial}"
        shutil.copytree(tmp_path / "whole", folder)
        done = damage(folder / "3", chance)
        with Checkpoints(folder, CONFIG) as checkpoints:
            step, restored = checkpoints.restore_newest(like, accept)
            assert bits(restored) == exact[step], done
            checkpoints.save(4, restored, {}, wait=True)  # and the run goes on
        newest += step == 3
        assert (
            step == 3
            or (folder / "3.damaged-1").is_dir()
            or not (folder / "3" / checkpoint.COMMIT_MARK).exists()
            or (not (folder / "3" / checkpoint.METADATA_FILE).exists())
        )
        shutil.rmtree(folder)
    print(f"{trials} damaged: {newest} newest, {trials - newest} older, all exact")


def test_one_flipped_bit_in_the_arrays_is_seen(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {})
    stored = tmp_path / "1" / checkpoint.METADATA_FILE
    words = json.loads(stored.read_text())
    sums = json.loads((tmp_path / "1" / checkpoint.COMMIT_MARK).read_text())["checksums"]
    assert sums["params/bias"] != sums["optimizer/1/0/mu/bias"]
    changed = {**state, "params": {**state["params"], "bias": state["params"]["bias"].at[5].multiply(1 + 2**-23)}}
    assert checkpoint.wrong_leaves(sums, {"params/bias": changed["params"]["bias"]}) == ["params/bias"]
    words["custom_metadata"]["leaves"]["params/bias"] = "float32[17]"
    stored.write_text(json.dumps(words))
    with pytest.raises(DamagedCheckpoint, match="SHA-256 differs"):
        checkpoint.restore(tmp_path, 1, abstract(state))


def test_when_all_are_damaged_no_run_starts_afresh(tmp_path, state):
    save_three(tmp_path, state)
    for step in (1, 2, 3):
        for data in (tmp_path / f"{step}" / "state").glob("**/d/*"):
            data.write_bytes(b"")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged") as caught:
            checkpoints.restore_newest(abstract({**state, "step": jnp.int32(0)}), accept)
        assert str(caught.value).count("cannot be read") == 3
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(CheckpointError, match="holds no whole checkpoint, but 3"):
        checkpoints.step_to_resume()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.damaged-1", "2.damaged-1", "3.damaged-1"]


def test_another_runs_checkpoint_is_not_damaged(tmp_path, state):
    save_three(tmp_path, state)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(CheckpointError, match="this run has no such array"):
            checkpoints.restore_newest(abstract(without_bias(state)), accept)
        with pytest.raises(ZeroDivisionError):
            checkpoints.restore_newest(abstract(state), lambda step, metadata: 1 / 0)
    assert committed_steps(tmp_path) == [1, 2, 3]


def test_after_a_return_later_steps_are_set_aside_and_their_numbers_free(tmp_path, state):
    exact = save_three(tmp_path, state)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        restored = checkpoints.restore(1, abstract({**state, "step": jnp.int32(0)}))
        checkpoints.set_aside_after(1, "a spike at step 2")
        checkpoints.save(2, restored, {}, wait=True)
        assert bits(checkpoints.restore(2, abstract(restored))) == exact[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.rolled-back-1", "3.rolled-back-1"]
    assert (tmp_path / "3.rolled-back-1" / "why_set_aside.txt").read_text() == "a spike at step 2\n"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.int32], ids=str)
def test_checksums_are_of_the_bits_in_their_places_on_any_mesh(dtype):
    values = np.random.default_rng(0).integers(0, 2 if dtype == jnp.bool_ else 100, (6, 8, 16)).astype(dtype)
    wide = {"x": jax.device_put(values, NamedSharding(mesh(4, 2), P(None, "fsdp", "tensor")))}
    ((_, whole),) = checksums(wide).items()
    for onto, spec in ((mesh(1, 1), P()), (mesh(2, 4), P("fsdp", "tensor")), (mesh(8, 1), P(None, "fsdp"))):
        assert checksums({"x": jax.device_put(values, NamedSharding(onto, spec))})["x"] == whole
    assert checksums({"x": jnp.asarray(values)})["x"] == whole
    blocks = [values[i : i + 4, :, j : j + 7] for i in (0, 4) for j in (0, 7, 14)]
    corners = [[i, 0, j] for i in (0, 4) for j in (0, 7, 14)]
    parts = [{"x": block_checksum(block, corner, values.shape)} for block, corner in zip(blocks, corners, strict=True)]
    assert total(parts)["x"] == whole
    words = values.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[values.itemsize]).astype(np.uint64).ravel()
    first = int(np.sum(words * (2 * np.arange(words.size, dtype=np.uint64) + 1))) % 2**32
    assert whole.startswith(f"{first:08x}")
    swapped = values.copy().reshape(-1)
    i, j = 3, next(j for j in range(4, swapped.size) if swapped[j] != swapped[3])
    swapped[[i, j]] = swapped[[j, i]]
    assert checksums({"x": jnp.asarray(swapped.reshape(values.shape))})["x"] != whole


# ---------------------------------------------------------------------------------------------------------------------
# Which folders count, and which stay


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, 0, [7]), (3, 0, [5, 6, 7]), (2, 3, [3, 6, 7]), (1, 2, [2, 4, 6, 7]), (10, 0, [1, 2, 3, 4, 5, 6, 7])],
)
def test_retention(tmp_path, keep, keep_every, left):
    small = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path, CheckpointConfig(keep=keep, keep_every=keep_every)) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, small, {})
    assert committed_steps(tmp_path) == left
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left  # and nothing else remains


def test_a_failed_save_costs_no_older_checkpoint(tmp_path):
    small = {"w": jnp.arange(4096.0)}
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(1, small, {}, wait=True)
        with full_disk(), pytest.raises(CheckpointError):
            checkpoints.save(2, small, {}, wait=True)
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, small, {}, wait=True)
        assert committed_steps(tmp_path) == [3]


def test_what_the_disk_does_not_take_is_not_committed(tmp_path, monkeypatch):
    small, fsync = {"w": jnp.arange(4096.0)}, os.fsync

    def failing(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/_METADATA"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(1, small, {}, wait=True)
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", failing)
            with pytest.raises(CheckpointError, match="step 2 could not be saved.*Input/output error"):
                checkpoints.save(2, small, {}, wait=True)
        assert committed_steps(tmp_path) == [1]
        checkpoints.save(3, small, {}, wait=True)


def test_a_failed_save_is_removed_though_its_writes_go_on(tmp_path, monkeypatch):
    """TensorStore makes the folder of a file that it still writes, after the folder was deleted."""
    deleted = saving.delete

    def delete(path):
        deleted(path)
        monkeypatch.setattr(saving, "delete", deleted)
        path.mkdir()

    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, {"w": jnp.arange(8.0)}, {}, wait=True)
    monkeypatch.setattr(saving, "delete", delete)
    with full_disk(), pytest.raises(CheckpointError, match="step 2 could not be saved"):
        checkpoints.save(2, {"w": jnp.arange(4096.0)}, {}, wait=True)
    assert saving.delete is deleted
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {}, wait=True)
    assert committed_steps(tmp_path) == [1]


def test_only_committed_steps_count_and_leftovers_are_cleaned(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {})
    (tmp_path / "3").rename(tmp_path / "3.partial")  # killed in a deletion
    (tmp_path / "40").mkdir()  # fault 6: an empty folder
    (tmp_path / "50").mkdir()
    (tmp_path / "50" / "state").mkdir()  # half of a copy
    (tmp_path / "60.partial.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # killed in a save
    shutil.copytree(tmp_path / "2", tmp_path / "61.partial")  # killed when it was about to be committed
    (tmp_path / "007").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "8").write_text("a file")
    assert committed_steps(tmp_path) == [1, 2]
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 2
        assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "40", "50", "007", "notes", "8"}
        checkpoints.save(50, state, {}, wait=True)  # a folder in the way that is no checkpoint gives way to one
        assert checkpoints.latest_step() == 50
        assert (tmp_path / "50.damaged-1" / "state").is_dir()  # and is kept: it may be one that lost its mark
        assert bits(checkpoints.restore(50, abstract(state))) == bits(state)


def test_a_damaged_old_step_blocks_nothing(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    (tmp_path / "1" / checkpoint.METADATA_FILE).write_bytes(b"\xff\x00")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert bits(checkpoints.restore(2, abstract(state))) == bits(state)
        checkpoints.save(3, state, {})


def test_the_same_step_is_written_once_and_an_older_one_not_at_all(tmp_path, state):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(5, state, {})
        checkpoints.save(5, state, {}, wait=True)  # the last step was a multiple of `every` as well
        with pytest.raises(CheckpointError, match="step 4 cannot be saved .* already holds step 5"):
            checkpoints.save(4, state, {})
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(CheckpointError, match="already holds step 5"):
            checkpoints.save(5, state, {})
        checkpoints.restore(5, abstract(state))
        checkpoints.save(5, state, {})  # resumed and already at the last step


@pytest.mark.parametrize(("mode", "empty", "filled"), [("auto", None, 2), ("never", None, "error"), ("required", "error", 2)])
def test_step_to_resume(tmp_path, mode, empty, filled):
    config = CheckpointConfig(resume=mode)
    with Checkpoints(tmp_path, config) as checkpoints:
        for wanted in (empty, filled):
            if wanted == "error":
                with pytest.raises(CheckpointError, match="--run_dir"):
                    checkpoints.step_to_resume()
            else:
                assert checkpoints.step_to_resume() == wanted
            if wanted == empty:
                checkpoints.save(2, {"w": jnp.zeros(2)}, {}, wait=True)


# ---------------------------------------------------------------------------------------------------------------------
# Failures show, and cost no more than what failed


def test_an_asynchronous_failure_surfaces_at_the_next_save_and_poisons_nothing(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(1, state, {}, wait=True)
    with full_disk():
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved.*disk is full.*intact: 1$"):
            checkpoints.save(3, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # the failed save gave its space back
    checkpoints.save(3, state, {})
    checkpoints.close()
    assert committed_steps(tmp_path) == [1, 3]


def test_close_raises_for_a_lost_save_even_if_it_was_raised_before(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with full_disk():
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointError):
            checkpoints.wait()
    checkpoints.wait()
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        checkpoints.close()


def test_leaving_on_an_error_keeps_that_error(tmp_path, state):
    def run():
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            checkpoints.save(2, state, {})
            raise ZeroDivisionError

    with full_disk(), pytest.raises(ZeroDivisionError):
        run()


def test_a_folder_that_vanishes_is_an_error(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "run", CONFIG)
    checkpoints.save(1, state, {}, wait=True)
    (tmp_path / "run").rename(tmp_path / "gone")
    checkpoints.save(2, state, {})
    with pytest.raises(CheckpointError, match="step 2 could not be saved.*has vanished, and step 1 with it"):
        checkpoints.wait()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
def test_a_folder_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """It merges no files there: the save would look well and could not be read."""
    with pytest.raises(CheckpointError, match="wildcards.*give another --run_dir"):
        Checkpoints(tmp_path / name / "checkpoints", CONFIG)
    assert not (tmp_path / name).exists()


def test_an_unwritable_folder_fails_at_once_and_the_process_ends(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/1/checkpoints"):
        with pytest.raises(CheckpointError, match="cannot write checkpoints into .*--run_dir"):
            Checkpoints(folder, CONFIG)
    script = (
        "import shutil, sys, jax.numpy as jnp\n"
        "from jaxtrain.checkpoint import Checkpoints\n"
        "from jaxtrain.config import CheckpointConfig\n"
        "checkpoints = Checkpoints(sys.argv[1], CheckpointConfig())\n"
        "shutil.rmtree(sys.argv[1]); open(sys.argv[1], 'w')\n"
        "checkpoints.save(1, {'w': jnp.zeros(4)}, {})\n"
        "checkpoints.close()\n"
    )
    # Orbax's own threads would hold the interpreter for 305 s; the limit here only tells that from a busy machine
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "CheckpointError: the checkpoint of step 1 could not be saved" in done.stderr


WRITER = """
import sys, jax, jax.numpy as jnp
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import CheckpointConfig
directory = sys.argv[1]
grow = jax.jit(lambda s: {"w": s["w"] * 3 + s["step"], "step": s["step"] + 1}, donate_argnums=0)
with Checkpoints(directory, CheckpointConfig(keep=2)) as checkpoints:
    state = {"w": jnp.arange(1 << 17, dtype=jnp.uint32), "step": jnp.uint32(0)}
    step = checkpoints.latest_step()
    if step is not None:
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = checkpoints.restore(step, placed)
    print("ready", flush=True)
    for step in range(int(state["step"]) + 1, 100_000):
        state = grow(state)
        checkpoints.save(step, state, {"step": step})
"""


def grown(step):
    w = np.arange(1 << 17, dtype=np.uint32)
    for i in range(step):
        w = w * np.uint32(3) + np.uint32(i)
    return w


def test_kill_at_any_moment_of_saving_leaves_an_exact_latest_step(tmp_path):
    kills = int(os.environ.get("JAXTRAIN_TEST_KILLS", "3"))
    rng, last = random.Random(0), -1
    one = SingleDeviceSharding(jax.devices()[0])
    like = {
        "w": jax.ShapeDtypeStruct((1 << 17,), jnp.uint32, sharding=one),
        "step": jax.ShapeDtypeStruct((), jnp.uint32, sharding=one),
    }
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        until = time.monotonic() + 60
        while not [step for step in committed_steps(tmp_path) if step > last] and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.7))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        step = committed_steps(tmp_path)[-1]
        assert step > last
        restored = checkpoint.restore(tmp_path, step, like)
        assert int(restored["step"]) == step == checkpoint.read_metadata(tmp_path, step)["step"]
        np.testing.assert_array_equal(np.asarray(restored["w"]), grown(step))
        last = step
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {str(step) for step in committed_steps(tmp_path)}
        assert checkpoints.latest_step() == last


PEER = """
import os, sys, jax, numpy as np
from pathlib import Path
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtrain.checkpoint import Checkpoints, saving
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError, DamagedCheckpoint, LostSave
rank, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, coordinator_bind_address=f"127.0.0.1:{port}")
def placed(shape, spec):
    return NamedSharding(jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2), spec)
w = np.arange(4096, dtype=np.float32).reshape(64, 64)
make = lambda value, sharding: jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
def fail(*_):
    raise OSError("a fault of the test's")
with Checkpoints(directory, CheckpointConfig(keep=2, mirror=f"file://{directory}-copies")) as checkpoints:
    def save(step):
        state = {"w": make(w * step, placed((2, 2), P("a", "b"))), "step": make(np.int32(step), placed((2, 2), P()))}
        checkpoints.save(step, state, {"step": step})
    synced, fsync = set(), os.fsync
    def watched(descriptor):
        fsync(descriptor)
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    os.fsync = watched
    for step in (1, 2):
        save(step)
    checkpoints.wait()
    os.fsync, folder = fsync, Path(directory, "2.partial")
    written = {folder / path.relative_to(f"{directory}/2") for path in Path(directory, "2").rglob("*")} | {folder}
    own = {str(path) for path in written if ("process_1" in str(path.relative_to(directory))) == (rank == 1)}
    assert own == {path for path in synced if path.startswith(str(folder))} and len(own) > 4, own ^ synced
    commit, saving.commit = saving.commit, fail  # process 0 alone comes to it
    save(3)
    try:
        checkpoints.wait()
    except CheckpointError as error:
        assert "step 3 could not be saved" in str(error) and "a fault of the test's" in str(error), error
    else:
        raise AssertionError("a save that was not committed counts here")
    saving.commit = commit
    save(3)
    checkpoints.wait()
    like = {"w": jax.ShapeDtypeStruct(w.shape, np.float32, sharding=placed((1, 4), P("b", "a"))),
            "step": jax.ShapeDtypeStruct((), np.int32, sharding=placed((1, 4), P()))}
    state = checkpoints.restore(checkpoints.latest_step(), like)
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, (w * 3)[shard.index])
    assert int(state["step"].addressable_data(0)) == 3
    if rank == 1:  # process 0 reads nothing of this file
        largest = max(Path(directory, "2", "state", "ocdbt.process_1", "d").iterdir(), key=lambda file: file.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    try:
        checkpoints.restore(2, like)
    except DamagedCheckpoint as error:
        assert ("another process failed" in str(error)) == (rank == 0), error
    else:
        raise AssertionError("a checkpoint with half a file counts here")
    if rank == 0:
        checkpoints._mirror.wait()
    saving._PATIENCE = 0.5
    if rank == 1:
        saving.begin_checksums = fail
    try:
        save(4)
        checkpoints.wait()
    except LostSave as error:
        assert ("in process 1, OSError" if rank == 0 else "OSError: a fault of the test's") in str(error), error
    else:
        raise AssertionError("a save without the sums of process 1 counts here")
    print("right", flush=True)
    os._exit(0)  # as a run does: at the end of Python, jax would wait for the save that was given up
"""


def test_two_processes_save_together_agree_on_what_fails_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": f"{quick.FLAGS} --xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PEER]
    peers = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        for rank in range(2)
    ]
    try:
        for peer in peers:
            output, _ = peer.communicate(timeout=120)
            assert peer.returncode == 0, output.decode()
            assert b"right" in output
    finally:
        for peer in peers:
            peer.kill()
    assert committed_steps(tmp_path) == [2, 3]
    assert committed_steps(f"{tmp_path}-copies")[-1] == 3
    onto = NamedSharding(mesh(4, 2), P("tensor", "fsdp"))
    everywhere = NamedSharding(mesh(4, 2), P())
    like = {
        "w": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=onto),
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=everywhere),
    }
    restored = checkpoint.restore(tmp_path, 3, like)
    np.testing.assert_array_equal(restored["w"], 3 * np.arange(4096, dtype=np.float32).reshape(64, 64))


# ---------------------------------------------------------------------------------------------------------------------
# Is it the same run?


def metadata_of(fingerprint="abc", versions=None, **changes):
    config = Config()
    for flag, value in changes.items():
        section, name = flag.split("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
    return {"config": dataclasses.asdict(config), "data_fingerprint": fingerprint, "versions": versions or {"jax": "0.10.2"}}


TWO_SOURCES = (DataSource(), DataSource(kind="text", path="a"))


@pytest.mark.parametrize(
    ("before", "after", "hard", "soft"),
    [
        ({}, {}, [], []),
        ({"model__num_layers": 12}, {"model__num_layers": 24}, ["model.num_layers: 12 -> 24"], []),
        ({}, {"model__rope_scaling": RopeScaling()}, ["model.rope_scaling: None -> {'kind': "], []),
        ({}, {"model__attention": "reference"}, [], ["model.attention: auto -> reference"]),
        ({}, {"model__dtype": "float32"}, [], ["model.dtype: bfloat16 -> float32"]),
        ({}, {"model__param_dtype": "bfloat16"}, ["model.param_dtype: float32 -> bfloat16"], []),
        ({}, {"fingerprint": "xyz"}, ["data fingerprint: abc -> xyz"], []),
        ({}, {"data__tokenizer": "bpe:300"}, ["data.tokenizer: byte -> bpe:300"], []),
        ({}, {"data__sequence_length": 512}, ["data.sequence_length: 256 -> 512"], []),
        ({}, {"data__sources": (DataSource(weight=2.0),)}, ["data.sources.0.weight: 1.0 -> 2.0"], []),
        ({}, {"data__sources": (DataSource(path="moved"),)}, [], ["data.sources.0.path:  -> moved"]),
        ({}, {"data__sources": TWO_SOURCES}, ["data.sources.1.kind: not in the checkpoint -> text"], None),
        ({"data__sources": TWO_SOURCES}, {}, ["data.sources.1.kind: text -> gone"], None),
        ({}, {"train__global_batch_size": 64}, ["train.global_batch_size: 32 -> 64"], []),
        ({}, {"train__seed": 1, "optimizer__name": "lion"}, ["optimizer.name: adamw -> lion", "train.seed: 0 -> 1"], []),
        (
            {},
            {"mesh__tensor": 2, "pipeline__schedule": "gpipe"},
            [],
            ["mesh.tensor: 1 -> 2", "pipeline.schedule: 1f1b -> gpipe"],
        ),
        ({}, {"train__microbatches": 4, "train__steps": 9}, [], ["train.steps: 1000 -> 9", "train.microbatches: 1 -> 4"]),
        (
            {},
            {"train__log_every": 1, "optimizer__peak_lr": 1.0},
            [],
            ["optimizer.peak_lr: 0.0003 -> 1.0", "train.log_every: 10 -> 1"],
        ),
        ({}, {"versions": {"jax": "0.11.0"}}, [], ["versions.jax: 0.10.2 -> 0.11.0"]),
    ],
)
def test_differences(tmp_path, before, after, hard, soft):
    saved = json.loads(json.dumps(metadata_of(**before)))  # as a checkpoint gives it back
    current = metadata_of(**after)
    found = differences(saved, current)
    assert len([line for line in found.hard if line.startswith(tuple(hard))]) >= len(hard)
    assert bool(found.hard) == bool(hard)
    assert soft is None or found.soft == soft
    if hard:
        with pytest.raises(CheckpointError) as caught:
            check_same_run(saved, current, tmp_path)
        assert all(line in str(caught.value) for line in [*found.hard, "--run_dir", "--checkpoint.resume=never"])
    else:
        assert check_same_run(saved, current, tmp_path) == found.soft


def test_a_field_that_the_checkpoint_does_not_know_is_no_other_run():
    saved = metadata_of()
    del saved["config"]["model"]["qk_norm"], saved["data_fingerprint"]
    found = differences(saved, metadata_of())
    assert found.hard == []
    assert found.soft == ["model.qk_norm: not in the checkpoint -> none", "data fingerprint: None -> abc"]
