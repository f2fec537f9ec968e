"""A run through three stages: other weights, batches, lengths, positions, rates; interrupted, on other meshes, and edited."""

from __future__ import annotations

import contextlib
import json
import shutil
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
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    Stage,
    SyncConfig,
    TrainConfig,
    config_at,
    to_json,
)
from jaxtrain.config.rules import find_problems, validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.train import step as step_module
from jaxtrain.train.loop import Hook
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.replay import replay
from jaxtrain.train.run import Run
from jaxtrain.train.schedule import rate_of_steps
from tests.launch.processes import started
from tests.tiny import MODEL
from tests.train.poison import NAN, poisonable
from tests.train.runs import Said, StopAt

STEPS = 18
STAGES = (
    Stage(name="wide", from_step=6, weights=(1.0, 3.0), global_batch_size=16, batch_rule="sqrt"),
    Stage(
        name="long",
        from_tokens=6 * 8 * 16 + 6 * 16 * 16,
        weights=(0.0, 1.0),
        global_batch_size=8,
        sequence_length=64,
        rope_theta=1e5,
        schedule="warmup_stable_decay",
        warmup_steps=2,
        decay_fraction=0.5,
        final_lr_fraction=0.0,
        weight_decay=0.01,
    ),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    random = np.random.default_rng(0)
    for name, words in (("plain", ["red ", "green ", "blue. "]), ("rare", ["one ", "two ", "three. "])):
        (folder / f"{name}.txt").write_text("".join(random.choice(words, 3000)))
    return Config(
        name="staged",
        run_dir=str(folder / "run"),
        model=replace(MODEL, num_layers=1, vocab_size=257),
        mesh=MeshConfig(fsdp=8),
        data=DataConfig(
            sources=(
                DataSource(kind="text", path=f"{folder}/plain.txt", weight=3.0),
                DataSource(kind="text", path=f"{folder}/rare.txt"),
            ),
            tokenizer="byte",
            sequence_length=16,
            validation_fraction=0.0,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=3, schedule="constant"),
        train=TrainConfig(
            steps=STEPS,
            stages=STAGES,
            global_batch_size=8,
            log_every=1,
            validate_every=0,
            remat="none",
            compilation_cache=str(folder / "compiled"),
        ),
        checkpoint=CheckpointConfig(every=1000),
    )


OTHER = MeshConfig(data=2, fsdp=2, tensor=2)
ANOTHER = MeshConfig(data=4, fsdp=1, context=2)


def with_stages(config, *stages):
    return replace(config, train=replace(config.train, stages=stages))


def run(config, mesh=None, stop=None):
    """(exit code, what was said)."""
    config, said = validate(replace(config, mesh=mesh or config.mesh), 8), Said()
    part = Run(Prepared(config), lambda: open_data(config), said, StopAt(stop) if stop else None)
    return part.train().exit_code, said.lines


def rows_of(config):
    rows = read_rows(config.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return rows


def losses(config):
    return np.array([row["loss"] for row in rows_of(config)])


@pytest.fixture(scope="module")
def whole(base):
    config = replace(base, run_dir=base.run_dir + "_whole")
    assert run(config)[0] == EXIT_DONE
    return config


@pytest.fixture(scope="module")
def stopped(base):
    """Stopped in the second stage."""
    config = replace(base, run_dir=base.run_dir + "_parts")
    assert run(config, stop=8)[0] == EXIT_STOPPED
    return config


def copy_of(stopped, name):
    config = replace(stopped, run_dir=f"{stopped.run_dir}_{name}")
    shutil.copytree(stopped.run_dir, config.run_dir)
    return config


def test_a_run_goes_on_through_its_stages_on_another_mesh(whole, stopped):
    config = copy_of(stopped, "mesh")
    assert run(config, OTHER)[0] == EXIT_DONE
    truth, found = losses(whole), losses(config)
    np.testing.assert_array_equal(found[:8], truth[:8])
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    assert truth[-1] < truth[0] - 0.5


def test_rows_name_the_stage_and_count_its_tokens(whole):
    rows = rows_of(whole)
    assert [row["stage"] for row in rows] == ["1"] * 6 + ["wide"] * 6 + ["long"] * 6
    assert np.diff([0, *(row["tokens"] for row in rows)]).tolist() == [128] * 6 + [256] * 6 + [512] * 6
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates[:6], [1e-3, 2e-3, *[3e-3] * 4], rtol=1e-6)
    wide = 3e-3 * 2**0.5
    np.testing.assert_allclose(rates[6:], [*[wide] * 6, wide, wide, wide, wide * 2 / 3, wide / 3, 0], rtol=1e-6, atol=1e-12)


def test_a_changed_past_is_refused_and_another_future_is_told(whole, stopped):
    """The future is the last stage, and one more after it; up to that the run is the other's, bit for bit."""
    wide, long = STAGES
    config = copy_of(stopped, "edited")
    for stages in ((replace(wide, weights=(2.0, 1.0)), long), (long,), (Stage(from_step=3), wide, long)):
        with pytest.raises(CheckpointError, match=r"train.stages, which has begun by step 8: from step [63]"):
            run(with_stages(config, *stages))
    with pytest.raises(CheckpointError, match=r"the longest sequence_length of train.stages: 64 -> 128"):
        run(with_stages(config, wide, replace(long, sequence_length=128)))
    code, said = run(with_stages(config, wide, long, Stage(from_step=15, peak_lr=1e-4)))
    assert code == EXIT_DONE
    (line,) = [line for text in said for line in text.split("\n") if "train.stages to come" in line]
    assert line.endswith("train.stages to come: none -> from step 15: peak_lr=0.0001")
    np.testing.assert_array_equal(losses(config)[:16], losses(whole)[:16])
    assert losses(config)[16] != losses(whole)[16]
    kept = read_metadata(config.directory / "checkpoints", max(committed_steps(config.directory / "checkpoints")))
    (earlier,) = kept["earlier_recipes"]
    assert earlier["to_step"] == 8
    assert [stage["first"] for stage in earlier["stages"]] == [6, 12]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "replicas", "conversations", "packed"])
def test_what_else_a_run_has_goes_through_stages(base, tmp_path, kind):
    """Interrupted in the second stage, it is the run that was not, bit for bit."""
    rows = [json.dumps({"prompt": f"{n} and ", "completion": "red " * (n % 3 + 1)}) for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    chat = DataSource(kind="chat", path=str(tmp_path / "rows.jsonl"))
    one_length = tuple(replace(stage, sequence_length=None) for stage in STAGES)
    config = {
        "adapters": replace(base, lora=LoraConfig(rank=4, alpha=8.0)),
        "replicas": replace(base, mesh=MeshConfig(replica=2, fsdp=4), sync=SyncConfig(mode="diloco", every=3)),
        "conversations": with_stages(replace(base, data=replace(base.data, sources=(base.data.sources[0], chat))), *one_length),
        "packed": with_stages(replace(base, data=replace(base.data, packing="best_fit")), *one_length),
    }[kind]
    config = replace(config, run_dir=f"{base.run_dir}_{kind}")
    twice = replace(config, run_dir=f"{base.run_dir}_{kind}_again")
    assert run(config)[0] == EXIT_DONE
    assert run(twice, stop=8)[0] == EXIT_STOPPED
    assert run(twice)[0] == EXIT_DONE
    np.testing.assert_array_equal(losses(config), losses(twice))
    if kind == "conversations":
        data = open_data(validate(config, 8))
        learned = [(batch["targets"] >= 0).mean() for batch in (data.train_batch(n, slice(None)) for n in (5, 12))]
        assert learned[1] < 0.5 < 0.7 < learned[0]


@pytest.mark.slow
def test_two_processes_train_what_one_does(base, whole, tmp_path):
    (tmp_path / "staged.json").write_text(to_json(base))
    flags = [f"--config={tmp_path / 'staged.json'}", f"--run_dir={tmp_path / 'two'}", "--train.compilation_cache="]
    with started(2, 4, flags, tmp_path) as both:
        assert [process.wait(500) for process in both] == [0, 0], (tmp_path / "0.log").read_text()[-2000:]
    rows = read_rows(tmp_path / "two" / "metrics.jsonl")
    np.testing.assert_allclose([row["loss"] for row in rows], losses(whole), rtol=1e-6)
    assert [row["stage"] for row in rows] == [row["stage"] for row in rows_of(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_twenty_interruptions(base, whole, seed):
    """On the same mesh bit for bit; with a mesh drawn for every part to rounding."""
    random = np.random.default_rng(seed)
    config = replace(base, run_dir=f"{base.run_dir}_{seed}", train=replace(base.train, steps=60, stages=later(STAGES, 3)))
    truth = replace(config, run_dir=base.run_dir + f"_truth_{seed}")
    assert run(truth)[0] == EXIT_DONE
    cuts = sorted(random.choice(np.arange(1, 60), 20, replace=False).tolist())
    for cut in cuts:
        mesh = (base.mesh, OTHER, ANOTHER)[random.integers(3)] if seed else base.mesh
        assert run(config, mesh, stop=cut)[0] == EXIT_STOPPED
    assert run(config)[0] == EXIT_DONE
    difference = np.abs(losses(config) / losses(truth) - 1).max()
    print(f"\n20 interruptions{' on meshes drawn at random' if seed else ''}: at most {difference:.1e} of a loss apart")
    assert difference <= (1e-5 if seed else 0)


class Crash(Hook):
    """Ends a run after a step, as if its process died: nothing is saved."""

    every = 1

    def __init__(self, step):
        self.step = step

    def after_step(self, step, state):
        if step == self.step:
            jax.block_until_ready(state)
            raise KeyboardInterrupt


def test_snapshots_rollbacks_validation_and_average_go_through_stages(base, tmp_path, monkeypatch):
    """Batch 15, of the last stage, is bad. A run that nothing else happens to, and one that goes on from a snapshot of the last
    stage and so has to go back to a checkpoint of the stage before, whose program it has not compiled.
    """
    poisonable(monkeypatch)
    (tmp_path / "held_out.txt").write_text("red one blue. two " * 100)
    config = replace(
        base,
        data=replace(base.data, validation=(DataSource(kind="text", path=str(tmp_path / "held_out.txt")),)),
        train=replace(base.train, validate_every=STEPS, validate_batches=2, ema_decay=0.9),
        checkpoint=CheckpointConfig(every=8, fast_dir=str(tmp_path / "fast")),
        guard=GuardConfig(non_finite="rollback"),
    )

    def train(name, fast=0, hooks=()):
        made = replace(config, run_dir=f"{config.run_dir}_{name}", checkpoint=replace(config.checkpoint, fast_every=fast))
        made = validate(replace(made, parts=replace(made.parts, hooks=hooks)), 8)
        part = Run(Prepared(made), lambda: open_data(made), Said(), None)
        healthy = part.data.train_batch

        def train_batch(number, rows):
            batch = healthy(number, rows)
            return batch | {"tokens": np.where(number == 15, NAN, batch["tokens"])}

        part.data.train_batch = train_batch
        compiled = []
        with monkeypatch.context() as patch:
            make = step_module.compile_train_step
            patch.setattr(step_module, "compile_train_step", lambda of, *a, **b: compiled.append(of.name) or make(of, *a, **b))
            with contextlib.suppress(KeyboardInterrupt):
                part.train()
        return made, part.progress.lines, len(compiled)

    quiet, _, programs = train("quiet")
    assert programs == 3
    crashed, _, programs = train("crashed", 2, (Crash(15),))
    assert programs == 3
    crashed, said, programs = train("crashed", 2)
    assert [line.split(",")[0] for line in said if line.startswith("resume")] == ["resume     from step 14"]
    assert any("back to step 8, without batches 15 to 15" in line for line in said)
    assert programs == 2
    ours, theirs = ([row for row in read_rows(c.directory / "metrics.jsonl") if "loss" in row] for c in (quiet, crashed))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert [row["stage"] for row in ours] == ["1"] * 6 + ["wide"] * 6 + ["long"] * 6
    scores = [[row for row in read_rows(c.directory / "metrics.jsonl") if "validation_loss" in row] for c in (quiet, crashed)]
    assert scores[0][-1]["validation_ema_loss"] == scores[1][-1]["validation_ema_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "mesh"), [(5, None), (11, ANOTHER), (17, None)])
def test_a_step_of_any_stage_is_replayed(whole, step, mesh):
    """From the initial state, through the stages before it."""
    config = validate(whole, 8)
    assert replay(config, step, mesh and validate(replace(whole, mesh=mesh), 8)).same


def later(stages, factor):
    """The stages, beginning so many times later."""
    return tuple(replace(s, from_step=s.from_step * factor, from_tokens=s.from_tokens * factor) for s in stages)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_each_stage_is_what_the_table_says(base):
    first, wide, long = Recipe(base).all
    assert [stage.name for stage in (first, wide, long)] == ["1", "wide", "long"]
    assert [stage.first for stage in (first, wide, long)] == [0, 6, 12]
    assert [stage.config.train.microbatches for stage in (first, wide, long)] == [1, 2, 1]  # 8 shards of one row at last
    assert Recipe(replace(base, mesh=MeshConfig(fsdp=2))).all[2].config.train.microbatches == 4
    assert long.config.data.sequence_length == 64
    assert wide.config.model.rope_theta == base.model.rope_theta
    assert config_at(base, 12).model.rope_theta == base.model.rope_theta
    assert config_at(base, 13).model.rope_theta == 1e5
    recipe = Recipe(base)
    assert [recipe.tokens(n) for n in (0, 6, 7, 12, 13)] == [0, 768, 1024, 2304, 2816]
    assert [recipe.rows(n) for n in (0, 6, 7, 12, 13)] == [0, 48, 64, 144, 152]
    assert recipe.block_length == 64
    beyond = with_stages(base, *STAGES, Stage(from_step=STEPS, sequence_length=256))
    assert Recipe(beyond).block_length == 256
    assert Recipe(beyond).at(STEPS).name == "long"


def test_a_stage_rewarms_from_the_rate_before_it(base):
    config = with_stages(base, Stage(from_step=9, schedule="cosine", warmup_steps=3, peak_lr=6e-3, schedule_steps=6))
    rates = [rate_of_steps(config)(n, n) for n in range(STEPS)]
    np.testing.assert_allclose(rates[8:12], [3e-3, 4e-3, 5e-3, 6e-3], rtol=1e-6)
    np.testing.assert_allclose(rates[15:], [6e-4] * 3, rtol=1e-6)
    skipped = [rate_of_steps(config)(n, n - 2) for n in range(9, 14)]
    np.testing.assert_allclose(skipped, [4e-3, 4e-3, 4e-3, 5e-3, 6e-3], rtol=1e-6)


WRONG = [
    ((Stage(from_step=1),), None),
    ((Stage(peak_lr=1.0),), "train.stages.0 begins with 0 steps done"),
    ((Stage(from_step=5), Stage(from_step=5)), "train.stages.1 begins with 5 steps done, train.stages.0 with 5"),
    ((Stage(from_step=5, from_tokens=5),), "give one of them"),
    ((Stage(from_step=5, weights=(1.0,)),), "has 1 shares for 2 data.sources"),
    ((Stage(from_step=5, weights=(0.0, 0.0)),), "stage 2: all weights are 0"),
    ((Stage(from_step=5, weights=(-1.0, 1.0)),), "is a share"),
    ((Stage(from_step=5, warmup_steps=5),), "give train.stages.0.schedule too"),
    ((Stage(from_step=5, sequence_length=24),), "sequence_length=16 does not divide the longest of all stages, 24"),
    ((Stage(from_step=5, peak_lr=1.0, batch_rule="sqrt"),), "give one of them"),
    ((Stage(from_step=5, global_batch_size=9),), "train.stages, stage 2: train.global_batch_size=9 is not a multiple"),
    ((Stage(from_step=5, sequence_length=0),), "train.stages.0.sequence_length=0 must be at least 1"),
    (
        (Stage(from_step=5, schedule="linear"),),  # type: ignore[arg-type]
        "train.stages.0.schedule='linear'",
    ),
]


@pytest.mark.parametrize(("stages", "words"), WRONG, ids=map(str, range(len(WRONG))))
def test_what_cannot_be_is_refused(base, stages, words):
    _, problems = find_problems(with_stages(base, *stages), 8)
    assert [words in problem for problem in problems] == ([True] if words else []), problems


def test_rows_packed_for_one_length_stay_that_long(base):
    chat = replace(base, data=replace(base.data, sources=(DataSource(kind="chat", path="x.jsonl"),)))
    (problem,) = find_problems(with_stages(chat, Stage(from_step=5, sequence_length=32)), 8)[1]
    assert "data.sources.0, kind=chat, are packed for one length" in problem
