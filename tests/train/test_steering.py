"""Runs that people steer: back to a step, from a step into another folder, the best step kept and found by its name."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoint import Checkpoints, committed_steps, read_metadata, restore
from jaxtrain.checkpoint.addresses import find
from jaxtrain.checkpoint.inspection import arrays
from jaxtrain.checkpoint.stored import read_stored, step_path
from jaxtrain.checkpoint.trees import leaves_by_path
from jaxtrain.config import CheckpointConfig, DataSource
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import CheckpointError
from jaxtrain.huggingface.exporting import opened
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.train.loading import load
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.run import Run
from jaxtrain.verbs.checkpoint import main
from tests.launch.processes import started, wait_for_line
from tests.launch.test_processes import FLAGS
from tests.tiny import MODEL, tiny
from tests.train.runs import Said, StopAt

STEPS = 8


def train(config, stop=None):
    """Return what a run said."""
    config = validate(config, 8)
    said = Said()
    Run(Prepared(config), lambda: open_data(config), said, stop).train()
    return said.lines


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steering")
    random = np.random.default_rng(0)
    for i in range(6):
        (folder / f"{i}.txt").write_text("".join(random.choice(["alpha ", "beta ", "0 1 2 "], 200)))
    return tiny(
        model=replace(MODEL, num_layers=1, vocab_size=257),
        mesh={"fsdp": 8},
        data={
            "sources": (DataSource(kind="text", path=f"{folder}/*.txt"),),
            "sequence_length": 16,
            "validation_fraction": 0.3,
            "cache_dir": str(folder / "cache"),
        },
        optimizer={"peak_lr": 1e-2},
        train={
            "steps": STEPS,
            "log_every": 1,
            "validate_every": 2,
            "remat": "none",
            "ema_decay": 0.5,
            "compilation_cache": str(folder / "compiled"),
        },
        checkpoint={"every": 2, "keep": 9},
        run_dir=str(folder / "run"),
    )


@pytest.fixture(scope="module")
def whole(base):
    train(base)
    return base


def steered(config, resume, folder=None, **fields):
    checkpoint = replace(config.checkpoint, resume=resume, **fields)
    return replace(config, checkpoint=checkpoint, run_dir=str(folder or config.directory))


def losses(folder):
    rows = [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1))
    return [loss for _, loss in rows]


def bits(folder, step=STEPS):
    return read_stored(step_path(folder / "checkpoints", step))["checksums"]


def test_from_a_step_of_another_run_it_is_the_same_run(whole, tmp_path):
    """Data position, optimizer and rows go on; the other run's folder is as it was."""
    config = steered(whole, f"{whole.directory}@4", tmp_path / "b")
    train(config, StopAt(5))
    assert committed_steps(config.directory / "checkpoints") == [5]
    said = train(config)  # the same command goes on
    assert any(line.startswith("resume     from step 5") for line in said)
    assert losses(config.directory) == losses(whole.directory)
    assert bits(config.directory) == bits(whole.directory)
    origin = {"run": str(whole.directory), "step": 4}
    assert read_metadata(config.directory / "checkpoints", STEPS)["branched_from"] == origin
    assert committed_steps(whole.directory / "checkpoints") == [2, 4, 6, 8]


def test_back_to_a_step(whole, tmp_path, capsys):
    config = replace(whole, run_dir=str(tmp_path / "c"))
    shutil.copytree(whole.directory, config.directory)
    before, saved = losses(config.directory), bits(config.directory)
    for resume, error in (("7", "no checkpoint of step 7 in .*; it holds steps 2, 4, 6, 8"), (f"{tmp_path}/c@4", "itself")):
        with pytest.raises(CheckpointError, match=error):
            train(steered(config, resume))
    other = replace(config, train=replace(config.train, seed=1))
    with pytest.raises(CheckpointError, match=r"train\.seed: 0 -> 1"):
        train(steered(other, "4"))
    assert committed_steps(config.directory / "checkpoints") == [2, 4, 6, 8]

    slower = steered(replace(config, optimizer=replace(config.optimizer, peak_lr=1e-3)), "4")
    said = train(slower, StopAt(5))
    branch = config.directory / "branches" / "after-4-1"
    assert f"branch     what came after step 4 is kept in {branch}" in said
    assert "optimizer.peak_lr: 0.01 -> 0.001" in " ".join(said)
    said = train(slower)  # the same command, as a supervisor starts it again
    assert any(line.startswith("resume     from step 5") for line in said)
    after = losses(config.directory)
    assert after[:4] == before[:4]
    assert not set(after[5:]) & set(before[5:])
    assert losses(branch) == before
    assert bits(branch) == saved
    assert main(["list", str(config.directory)]) == 0
    said = capsys.readouterr().out
    assert "branches/after-4-1: steps 6, 8" in said
    assert said.count("(best)") == 1

    assert main(["rewind", f"{config.directory}:4"]) == 0
    assert committed_steps(config.directory / "checkpoints") == [2, 4]
    assert main(["list", str(branch)]) == 0  # a branch is a run's folder


def test_the_best_is_kept_and_has_a_name(whole, tmp_path):
    rows = {1: 3.0, 2: 1.0, 3: 2.0, 5: 1.5}
    config = CheckpointConfig(keep=1, keep_best=1)
    with Checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        for step in range(1, 6):
            row = {"validation": {"step": max(s for s in rows if s <= step), "validation_loss": rows.get(step, 0.5)}}
            checkpoints.save(step, {"w": jnp.zeros(1)}, row, wait=True)
    assert committed_steps(tmp_path / "checkpoints") == [2, 5]  # step 4 has no validation of its own
    assert find(f"{tmp_path}@best")[1] == 2
    scores = {row["step"]: row["validation_loss"] for row in read_rows(whole.directory / "metrics.jsonl") if "loss" not in row}
    assert find(f"{whole.directory}@best")[1] == min(scores, key=scores.__getitem__)
    assert json.loads((whole.directory / "config.json").read_text())["train"]["validation_metric"] == "validation_loss"
    with Checkpoints(tmp_path / "bare" / "checkpoints", config) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(1)}, {}, wait=True)
    with pytest.raises(CheckpointError, match=r"no best checkpoint: none of its steps \(1\) was saved with a validation_loss"):
        find(f"{tmp_path / 'bare'}@best")


def test_the_average_has_a_name_everywhere(whole, tmp_path):
    """Validated beside the weights; loaded and exported by RUN@STEP@ema; refused where there is none."""
    row = next(row for row in read_rows(whole.directory / "metrics.jsonl") if "validation_loss" in row)
    assert 0 < row["validation_ema_loss"] != row["validation_loss"]
    name = f"{whole.directory}@{STEPS}@ema"
    held = dict(arrays(str(whole.directory / "checkpoints"), STEPS))
    loaded = leaves_by_path(load(name).params)[0]
    for path, leaf in loaded.items():
        own = held["/".join(("ema", *path))]
        whole_leaf = np.asarray(leaf).reshape(own.shape) if path[0] == "layers" else np.asarray(leaf)
        np.testing.assert_array_equal(whole_leaf[tuple(map(slice, own.shape))], own)
        assert not np.array_equal(own, held["/".join(("params", *path))])
    names = ["params/outer/final_norm/scale"] if "params/outer/final_norm/scale" in held else ["params/outer/table"]
    ((said, exported),) = opened(name)[1](names)
    assert said == names[0]
    np.testing.assert_array_equal(exported, held[names[0].replace("params", "ema")])
    dropping = Prepared(validate(replace(whole, train=replace(whole.train, ema_decay=0.0)), 8)).canonical().abstract
    assert "ema" not in restore(whole.directory / "checkpoints", STEPS, dropping)  # a run may go on without
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        config = {"config": json.loads((whole.directory / "config.json").read_text())}
        checkpoints.save(1, {"params": {"w": jnp.zeros(1)}}, config, wait=True)
    with pytest.raises(CheckpointError, match="holds no average of the weights; it was saved with"):
        opened(f"{tmp_path}@ema")


@pytest.mark.slow
def test_two_processes_go_back_together_and_no_snapshot_brings_later_steps_back(tmp_path):
    """Killed at the first row after the return, beyond which a snapshot of before still lies; every loss is the same again."""
    run = tmp_path / "run"
    flags = [*FLAGS, f"--run_dir={run}", "--train.steps=12", "--checkpoint.every=4", "--mesh.fsdp=1"]
    flags += ["--checkpoint.fast_every=3", f"--checkpoint.fast_dir={tmp_path / 'fast'}"]
    with started(2, 1, flags, tmp_path) as both:
        wait_for_line(run / "metrics.jsonl", '"step": 11,')
        for process in both:
            process.kill()
    before = losses(run)
    flags.append("--checkpoint.resume=4")
    with started(2, 1, flags, tmp_path) as both:
        wait_for_line(tmp_path / "0.log", "resume     from step 4")
        wait_for_line(run / "metrics.jsonl", '"step": 5,')
        for process in both:
            process.kill()
    assert committed_steps(run / "branches" / "after-4-1" / "checkpoints") == [8]
    with started(2, 1, flags, tmp_path) as both:
        assert [process.wait(240) for process in both] == [0, 0]
    assert "went back to step 4 before" in (tmp_path / "0.log").read_text()
    after = losses(run)
    assert after[: len(before)] == before[: len(after)]
    assert len(after) == 12
    assert len(list((run / "branches").iterdir())) == 1
