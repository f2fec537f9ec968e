"""The fast tier: snapshots come back to the bit where every process has one, whole, of this run and mesh; else nothing does."""

import re
import signal

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import SafetensorError

from jaxtrain.checkpoint import fast
from jaxtrain.checkpoint.fast import TOKEN_FILE, FastTier, _newest_of_all
from tests.launch.processes import started, wait_for_line
from tests.launch.test_processes import FLAGS, losses
from tests.lines import unstamped


def state_of(number, mesh_shape=(4, 2)):
    """A state over eight devices: sharded over both axes, over one, replicated, a scalar, and in bfloat16."""
    mesh = jax.make_mesh(mesh_shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    generator = np.random.default_rng(number)
    specs = {
        "both": PartitionSpec("a", "b"),
        "one": PartitionSpec(None, "b"),
        "none": PartitionSpec(),
        "two": PartitionSpec("b", "a"),
    }
    state = {
        name: jax.device_put(
            generator.normal(size=(8, 8)).astype("bfloat16" if name == "two" else "float32"), NamedSharding(mesh, spec)
        )
        for name, spec in specs.items()
    }
    return {"params": state, "step": jax.device_put(np.int32(number), NamedSharding(mesh, PartitionSpec()))}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(one, other):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.sharding == y.sharding
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def rollbacks_of(run_dir):
    """The list of rollbacks as the run has it: here, as a file holds it."""
    file = run_dir / "rollbacks.json"
    return lambda: file.read_text() if file.exists() else ""


@pytest.fixture
def tier(tmp_path):
    """Three snapshots, of steps 2, 4 and 6."""
    (tmp_path / "run").mkdir()
    tier = FastTier(tmp_path / "fast", tmp_path / "run", rollbacks_of(tmp_path / "run"))
    for step in (2, 4, 6):
        tier.save(step, state_of(step), {"step": step})
    tier.wait()
    return tier


def restored(tier, newer_than=0, like=None):
    """(step, state) that comes back, having been accepted with the metadata of that step."""
    accepted = []
    found = tier.restore(newer_than, abstract(like or state_of(0)), lambda step, metadata: accepted.append((step, metadata)))
    assert accepted == ([(found[0], {"step": found[0]})] if found else [])
    return found


def files(tmp_path):
    return {int(path.parent.name): path for path in (tmp_path / "fast").glob("*/*/*/process-0.safetensors")}


def test_the_newest_comes_back_to_the_bit_and_the_last_two_are_kept(tier, tmp_path):
    step, state = restored(tier)
    assert step == 6
    assert same(state, state_of(6))
    assert sorted(files(tmp_path)) == [4, 6]
    assert restored(tier, newer_than=6) is None
    tier.clear()
    assert restored(tier) is None
    assert list((tmp_path / "fast").glob("*/*")) == []


def test_a_state_that_is_donated_or_changed_afterwards_is_saved_as_it_was(tier):
    state = state_of(8)
    tier.save(8, state, {"step": 8})
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    tier.wait()
    assert same(restored(tier)[1], state_of(8))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "rename", "long header", "lying shape"])
def test_a_damaged_snapshot_is_passed_over(tier, tmp_path, damage):
    path = files(tmp_path)[6]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-100])
    elif damage == "delete":
        path.unlink()
    elif damage == "long header":
        path.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    elif damage == "lying shape":  # more elements than the array's span of bytes has
        shape = re.search(rb'"shape":\[(\d)', content).start(1)
        content[shape : shape + 1] = b"9"
        path.write_bytes(content)
    else:  # an older one in its place
        path.write_bytes(files(tmp_path)[4].read_bytes())
    step, state = restored(tier)
    assert step == 4
    assert same(state, state_of(4))


def test_another_layout_another_run_and_a_rollback_do_not_take_it(tier, tmp_path):
    assert restored(tier, like=state_of(0, (2, 4))) is None
    assert restored(FastTier(tmp_path / "fast", tmp_path / "run", rollbacks_of(tmp_path / "run")))[0] == 6
    (tmp_path / "run" / "rollbacks.json").write_text("[1]")
    assert restored(tier) is None
    tier.save(2, state_of(2), {"step": 2})  # the run is back there
    tier.wait()
    assert restored(tier)[0] == 2
    assert sorted(files(tmp_path)) == [2]
    (tmp_path / "run" / TOKEN_FILE).unlink()  # somebody began afresh in the same folder
    assert restored(FastTier(tmp_path / "fast", tmp_path / "run", rollbacks_of(tmp_path / "run"))) is None


def test_a_folder_that_others_can_write_or_that_is_full_stops_nothing(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    tier = FastTier(tmp_path / "fast", tmp_path / "run", rollbacks_of(tmp_path / "run"))
    root = tier._root
    root.mkdir(parents=True)
    root.chmod(0o777)
    tier.save(1, state_of(1), {})
    tier.save(2, state_of(2), {})
    tier.wait()
    assert restored(tier) is None
    assert caplog.text.count("can be written by others") == 1
    assert "checkpoints are saved as without it" in caplog.text
    root.chmod(0o700)
    tier.save(3, state_of(3), {"step": 3})
    tier.wait()
    assert restored(tier)[0] == 3
    assert caplog.text.count(f"a snapshot in {root} again") == 1


def test_a_run_folder_without_space_for_its_word_takes_snapshots_later(tmp_path, disk):
    """The word that ties snapshots to the run cannot be written at first: no snapshot, and no end of the run."""
    (tmp_path / "run").mkdir()
    disk.room = 0
    tier = FastTier(tmp_path / "fast", tmp_path / "run", rollbacks_of(tmp_path / "run"))
    tier.save(1, state_of(1), {"step": 1})
    tier.wait()
    assert restored(tier) is None
    disk.room = 1 << 30
    tier.save(2, state_of(2), {"step": 2})
    tier.wait()
    assert restored(tier)[0] == 2


def test_a_disk_that_fills_up_while_a_snapshot_is_written_stops_nothing(tier, tmp_path, monkeypatch, caplog):
    def full(arrays, path, about):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(fast, "save_file", full)
        tier.save(8, state_of(8), {"step": 8})
        tier.wait()
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "fast").glob("*/*/8/*")) == []
    assert restored(tier)[0] == 6


def test_the_newest_step_that_all_have(monkeypatch):
    """Of three processes, by the answers of each to what process 0 asks."""
    own = {0: [2, 4, 6], 1: [2, 4], 2: [4, 6]}
    assert _newest_of_all([]) is None
    assert _newest_of_all(own[0]) == 6  # a lone one
    monkeypatch.setattr(fast, "everywhere", lambda flag: flag and asked[-1] in own[1] and asked[-1] in own[2])
    asked = []
    monkeypatch.setattr(fast, "from_first", lambda value: asked.append(value) or value)
    assert _newest_of_all(own[0]) == 4
    own[1].remove(4)
    assert _newest_of_all(own[0]) is None


def test_a_run_whose_processes_are_killed_goes_on_from_its_snapshot(tmp_path):
    """Two processes, killed beyond the snapshot of a step of which there is no checkpoint; the losses are those of one life."""
    flags = [*FLAGS, f"--run_dir={tmp_path / 'run'}", "--train.steps=12", "--checkpoint.fast_every=3", "--mesh.fsdp=1"]
    flags += [f"--checkpoint.fast_dir={tmp_path / 'fast'}"]
    with started(2, 1, flags, tmp_path) as both:
        wait_for_line(tmp_path / "run" / "metrics.jsonl", '"step": 7,')
        for process in both:
            process.send_signal(signal.SIGKILL)
    before = losses(tmp_path / "run")
    with started(2, 1, flags, tmp_path) as both:
        assert [process.wait(400) for process in both] == [0, 0], (tmp_path / "0.log").read_text()[-3000:]
    (line,) = [line for line in unstamped((tmp_path / "0.log").read_text()).splitlines() if line.startswith("resume")]
    step = int(line.split()[3].rstrip(","))
    assert step in (6, 9)
    assert "a snapshot in" in line
    after = losses(tmp_path / "run")
    assert sorted(after) == list(range(1, 13))
    again = {number: loss for number, loss in before.items() if number > step}
    assert {number: after[number] for number in again} == again
    assert list((tmp_path / "fast").glob("*/*")) == []
