"""Runs whose batches go wrong: skipped, rolled back, stopped, within a budget, and the same after a resume on other layouts."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.checkpoint import committed_steps, read_metadata
from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED, NumbersError
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.train import run as run_module
from jaxtrain.train.bad_steps import BadSteps, RollBack
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.rollbacks import Rollback, Rollbacks
from jaxtrain.train.run import Run
from jaxtrain.train.state_check import StateCheck
from tests.tiny import MODEL
from tests.train.poison import NAN, SPIKE, poisonable
from tests.train.runs import Said, StopAt

STEPS, ROWS = 20, 16


@pytest.fixture(autouse=True)
def _poisonable(monkeypatch):
    poisonable(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    random = np.random.default_rng(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(random.choice(["alpha ", "beta ", "gamma\n"], 400)))
    return Config(
        run_dir=str(folder / "run"),
        model=replace(MODEL, head_dim=4, vocab_size=259),
        mesh=MeshConfig(data=4, fsdp=2),
        data=DataConfig(
            sources=(DataSource(kind="text", path=f"{folder}/*.txt"),),
            sequence_length=16,
            validation_fraction=0.2,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=ROWS,
            log_every=1,
            validate_every=0,
            remat="none",
            compilation_cache=str(folder / "compiled"),
        ),
        checkpoint=CheckpointConfig(every=4),
        guard=GuardConfig(non_finite="skip", spike="skip", spike_window=8, spike_deviations=100.0),
    )


def run(config, folder, nan=(), spike=(), stop_at=0, batch_of=None):
    """A run that is ready, of whose batches some are poisoned."""
    config = validate(replace(config, run_dir=f"{config.run_dir}_{folder}"), 8)
    made = Run(Prepared(config), lambda: open_data(config), Said(), StopAt(stop_at))
    healthy = made.data.train_batch

    def train_batch(number, rows):
        number = batch_of(number) if batch_of else number
        batch = healthy(number, rows)
        tokens = batch["tokens"].copy()
        for token, numbers in ((NAN, nan), (SPIKE, spike)):
            if number in numbers:
                tokens[3, 2] = token
        return {**batch, "tokens": tokens}

    made.data.train_batch = train_batch
    return made


def rows_of(made, kind="loss"):
    return [row for row in read_rows(made.directory / "metrics.jsonl") if kind in row]


def losses(made):
    rows = rows_of(made)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([math.nan if row["loss"] is None else row["loss"] for row in rows])


def told(made, word):
    return [line for line in made.progress.lines if line.startswith(word)]


# ---------------------------------------------------------------------------------------------------------------------
# skip


def test_bad_batches_are_skipped_and_a_resume_on_another_mesh_skips_the_same(base):
    """A NaN in step 6, a spike in step 16; interrupted after step 10, when the spike's window is in the checkpoint alone."""
    bad = {"nan": (5,), "spike": (15,)}
    whole = run(base, "whole", **bad)
    assert whole.train().exit_code == EXIT_DONE
    first = run(base, "parts", stop_at=10, **bad)
    assert first.train().exit_code == EXIT_STOPPED
    piped = replace(base, mesh=MeshConfig(pipe=2, data=2, fsdp=1, tensor=2), train=replace(base.train, microbatches=2))
    second = run(piped, "parts", **bad)
    assert second.train().exit_code == EXIT_DONE
    for made in (whole, second):
        rows = rows_of(made, "bad_step")
        assert [(row["step"], row["batch"], row["first_sample"], row["last_sample"], row["policy"]) for row in rows] == [
            (6, 5, 80, 95, "skip"), (16, 15, 240, 255, "skip")
        ]  # fmt: skip
        assert "its loss is nan" in rows[0]["bad_step"]
        assert "deviations above the median" in rows[1]["bad_step"]
    assert len(told(whole, "skipped    step ")) == 2
    assert "batch 15, samples 240 to 255); 2 of guard.budget=10 used" in told(second, "skipped    step 16")[0]
    np.testing.assert_array_equal(losses(second)[:10], losses(whole)[:10])
    np.testing.assert_allclose(losses(second), losses(whole), rtol=1e-5)
    assert rows_of(whole)[-1]["skipped_steps"] == 2
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    # The optimizer took two steps fewer, and its learning rate is that of the steps it took.
    rates = [row["learning_rate"] for row in rows_of(whole)]
    assert rates[6] == rates[5]
    assert rates[5] < rates[4]


# ---------------------------------------------------------------------------------------------------------------------
# rollback


def without(numbers):
    """Steps before -> batch, where these batches do not exist."""
    left = [n for n in range(200) if n not in numbers]
    return left.__getitem__


def test_a_rollback_gives_the_losses_of_a_run_without_the_batches(base):
    """Batch 1 is a NaN in step 2: back to the beginning, without 0 and 1. Batch 8 then comes in step 7: back to 4, without 7
    and 8. Batch 19, a spike, comes in step 16: back to 12. A second run is stopped in between, and goes on on another mesh."""
    guard = replace(base.guard, non_finite="rollback", spike="rollback", rollback_batches=2)
    config = replace(base, guard=guard, checkpoint=replace(base.checkpoint, resume="never"))
    bad = {"nan": (1, 8), "spike": (19,)}
    rolled = run(config, "rolled", **bad)
    assert rolled.train().exit_code == EXIT_DONE
    truth = run(base, "truth", batch_of=without((0, 1, 7, 8, 18, 19)))
    assert truth.train().exit_code == EXIT_DONE
    np.testing.assert_array_equal(losses(rolled), losses(truth))
    listed = json.loads((rolled.directory / "rollbacks.json").read_text())
    names = ("bad_step", "back_to", "first_batch", "last_batch")
    assert [tuple(entry[name] for name in names) for entry in listed] == [(2, 0, 0, 1), (7, 4, 7, 8), (16, 12, 18, 19)]
    assert read_metadata(rolled.directory / "checkpoints", STEPS)["rollbacks"] == listed
    assert [(row["step"], row["rolled_back_from"]) for row in rows_of(rolled, "bad_step")] == [(0, 2), (4, 7), (12, 16)]
    assert "back to step 12, without batches 18 to 19 from now on" in told(rolled, "rollback")[2]

    config = replace(config, checkpoint=base.checkpoint)
    first = run(config, "again", stop_at=9, **bad)
    assert first.train().exit_code == EXIT_STOPPED
    (first.directory / "rollbacks.json").unlink()  # it is in the checkpoint too
    piped = replace(config, mesh=MeshConfig(pipe=2, data=2, fsdp=1, tensor=2), train=replace(config.train, microbatches=2))
    second = run(piped, "again", **bad)
    assert second.train().exit_code == EXIT_DONE
    np.testing.assert_allclose(losses(second), losses(truth), rtol=1e-5)


def test_a_copy_that_differs_is_rolled_back_and_nothing_is_left_out(base, monkeypatch):
    class Struck(StateCheck):
        """Device 2 loses a bit before step 8 is saved, once."""

        def __call__(self, step, state):
            if step == 8 and not self._rollbacks.all:
                table = state["params"]["outer"]["table"]
                arrays = [np.array(shard.data) for shard in table.addressable_shards]
                arrays[2].view(np.uint32)[3, 3] ^= 1
                arrays = [jax.device_put(a, s.device) for a, s in zip(arrays, table.addressable_shards, strict=True)]
                table = jax.make_array_from_single_device_arrays(table.shape, table.sharding, arrays)
                params = state["params"]
                state = state | {"params": params | {"outer": params["outer"] | {"table": table}}}
            super().__call__(step, state)

    monkeypatch.setattr(run_module, "StateCheck", Struck)
    config = replace(base, guard=replace(base.guard, copies="rollback"), train=replace(base.train, steps=9))
    made = run(config, "struck")
    assert made.train().exit_code == EXIT_DONE
    (line,) = told(made, "rollback")
    assert "device 2 of process 0 (data=1, fsdp=0): params/outer/table; back to step 4" in line
    assert json.loads((made.directory / "rollbacks.json").read_text())[0]["back_to"] == 4
    assert len(losses(made)) == 9


# ---------------------------------------------------------------------------------------------------------------------
# stop


def test_a_bad_step_stops_the_run_and_saves_nothing(base):
    """The default, in which the step does not classify itself."""
    made = run(replace(base, guard=GuardConfig()), "stop", nan=(7,))
    with pytest.raises(NumbersError) as caught:
        made.train()
    message = str(caught.value)
    assert message.startswith("step 8 went wrong: its loss is nan and its gradient norm is nan (batch 7, samples 112 to 127)")
    for flag in ("--guard.non_finite=skip", "--guard.non_finite=rollback", "--guard.debug_nans=True"):
        assert flag in message
    assert committed_steps(made.directory / "checkpoints") == [4]  # and not 8, which is the bad step's own
    assert [(row["step"], row["policy"]) for row in rows_of(made, "bad_step")] == [(8, "stop")]


def test_the_first_bad_number_is_looked_for_in_the_state_before_the_step(base, monkeypatch):
    """The NaN probe gets the bad step's own batch, and parameters that its update has not touched."""
    seen = []

    class FakeProbe:
        def __init__(self, config, mesh, backend):
            pass

        def __call__(self, params, batch):
            seen.append((jax.tree.map(np.asarray, params), np.asarray(batch["tokens"])))
            return "layer 1, exp"

    monkeypatch.setattr(run_module, "NanProbe", FakeProbe)
    config = replace(base, guard=replace(base.guard, non_finite="stop", debug_nans=True))
    made = run(config, "probed", nan=(2,))
    with pytest.raises(NumbersError, match="its gradient norm is nan; layer 1, exp "):
        made.train()
    ((params, tokens),) = seen
    assert (tokens == NAN).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------------------------------------------------------------
# The hook by itself


class Log:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_the_budget_counts_skips_and_rollbacks_together(base, policy):
    config = replace(base, guard=replace(base.guard, non_finite=policy, budget=2))
    rollbacks, log = Rollbacks([Rollback(5, 4, "", 4, 4)]), Log()
    hook = BadSteps(config, log, Said(), rollbacks)
    metrics = {"loss": np.float32(math.nan), "total_loss": np.float32(math.nan), "targets": np.float32(1)}
    metrics |= {"grad_norm": np.float32(1), "bad_step": np.int32(1)}
    if policy == "skip":
        hook.metrics_read(9, metrics | {"skipped_steps": np.int32(1)})
    else:
        with pytest.raises(RollBack):
            hook.metrics_read(9, metrics | {"skipped_steps": np.int32(1)})
    with pytest.raises(NumbersError, match=r"guard.budget=2 exceeded: 3 .*step 10 went wrong: its loss is nan"):
        hook.metrics_read(10, metrics | {"skipped_steps": np.int32(2)})
    assert [(row["step"], row["batch"]) for row in log.rows] == [(9, 9), (10, 10)]  # batch 4 is left out


# ---------------------------------------------------------------------------------------------------------------------
# The list


def test_batches_left_out_are_the_natural_numbers_without_them():
    rollbacks = Rollbacks()
    assert [rollbacks.batch(n) for n in range(4)] == [0, 1, 2, 3]
    rollbacks.add(bad_step=8, back_to=4, reason="", batches=2)
    rollbacks.add(bad_step=8, back_to=4, reason="", batches=100)  # none from before the checkpoint
    rollbacks.add(bad_step=9, back_to=8, reason="", batches=0)
    assert rollbacks.all[0] == Rollback(8, 4, "", 6, 7)
    assert rollbacks.left_out() == [(4, 9)]
    assert [rollbacks.batch(n) for n in range(7)] == [0, 1, 2, 3, 10, 11, 12]
    assert [r.first_batch <= r.last_batch for r in rollbacks.all] == [True, True, False]
    random = np.random.default_rng(0)
    many = Rollbacks([Rollback(0, 0, "", int(a), int(a) + int(n)) for a, n in random.integers(0, 30, (8, 2))])
    gone = {n for r in many.all for n in range(r.first_batch, r.last_batch + 1)}
    assert [many.batch(n) for n in range(20)] == [n for n in range(200) if n not in gone][:20]
    assert Rollbacks.from_plain(many.to_plain()).all == many.all
