"""A run in this process, on eight fake devices: resumed on other layouts, stopped by hooks, refused where it is another run."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    MeshConfig,
    OptimizerConfig,
    PipelineConfig,
    SyncConfig,
    TelemetryConfig,
    TrainConfig,
)
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED, ExplainedError
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.train.gradients import make_evaluation_step
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.run import Run
from jaxtrain.train.run_dir import largest_before, make_run_dir, only_run_in
from tests.tiny import MODEL
from tests.train.runs import Said, StopAt

WORDS = ["alpha ", "beta ", "gamma\n", "été ", "0 1 2 "]
STEPS, FIRST_STOP, SECOND_STOP = 45, 5, 25


class Recorded(Prepared):
    """Remembers the token ids of every global batch, in order."""

    def __init__(self, config):
        super().__init__(config)
        self.batches = []

    def place(self, batch, num_rows=None):
        placed = super().place(batch, num_rows)
        self.batches.append(np.asarray(placed["tokens"]))
        return placed


class RecordingRun(Run):
    """A run by itself, of which `train` returns the exit code."""

    def __init__(self, config, progress, stop=None):
        super().__init__(Recorded(config), lambda: open_data(config), progress, stop)

    @property
    def batches(self):
        return self.prepared.batches

    def train(self):
        return super().train().exit_code


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Five layers and 259 ids: neither divides evenly in the layouts below."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(random.choice(WORDS, 300)))
    return Config(
        name="tiny",
        run_dir=str(folder / "run"),
        model=replace(MODEL, num_layers=5, head_dim=4, mlp_dim=32, vocab_size=259),
        mesh=MeshConfig(fsdp=8),
        data=DataConfig(
            sources=(DataSource(kind="text", path=f"{folder}/*.txt"),),
            tokenizer="byte",
            sequence_length=16,
            validation_fraction=0.2,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=3),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=16,
            log_every=1,
            validate_every=0,
            remat="none",
            compilation_cache=str(folder / "compiled"),
        ),
        checkpoint=CheckpointConfig(every=1000),
    )


def other_layout(config):
    """Five layers in four parts on two stages, 384 padded ids over tensor, gradient accumulation, folded."""
    return replace(
        config,
        mesh=MeshConfig(pipe=2, data=2, fsdp=1, tensor=2),
        pipeline=PipelineConfig(schedule="v_shape", chunks=2),
        train=replace(config.train, microbatches=2),
    )


def losses(config):
    rows = read_rows(config.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows])


@pytest.fixture(scope="module")
def uninterrupted(base):
    config = replace(base, run_dir=base.run_dir + "_whole", checkpoint=replace(base.checkpoint, every=0))
    whole = RecordingRun(validate(config, 8), Said())
    assert whole.train() == EXIT_DONE
    return whole


@pytest.fixture(scope="module")
def interrupted(base):
    """On fsdp=8 to step 5, on two stages x data x tensor to 25, on fsdp=8 again to the end."""
    config = replace(base, run_dir=base.run_dir + "_parts")
    parts = [
        RecordingRun(validate(config, 8), Said(), StopAt(FIRST_STOP)),
        RecordingRun(validate(other_layout(config), 8), Said(), StopAt(SECOND_STOP)),
        RecordingRun(validate(config, 8), Said()),
    ]
    assert [part.train() for part in parts] == [EXIT_STOPPED, EXIT_STOPPED, EXIT_DONE]
    return parts


def test_losses_go_on_through_other_layouts(uninterrupted, interrupted):
    truth, resumed = losses(uninterrupted.config), losses(interrupted[0].config)
    assert len(resumed) == STEPS
    np.testing.assert_array_equal(resumed[:FIRST_STOP], truth[:FIRST_STOP])
    np.testing.assert_allclose(resumed, truth, rtol=1e-6)
    assert truth[-1] < truth[0] - 0.5


def test_global_batches_are_the_same_on_every_layout(uninterrupted, interrupted):
    batches = [batch for part in interrupted for batch in part.batches]
    np.testing.assert_array_equal(batches, uninterrupted.batches)
    assert len({batch.tobytes() for batch in batches}) == STEPS


def test_a_resume_says_where_from_and_what_has_changed(interrupted):
    first, second, third = (run.progress.lines for run in interrupted)
    assert not [line for line in first if line.startswith("resume")]
    (said,) = [line for line in second if line.startswith("resume")]
    assert f"step {FIRST_STOP}" in said
    for change in ("mesh.fsdp: 8 -> 1", "mesh.pipe: 1 -> 2", "pipeline.chunks: 1 -> 2", "train.microbatches: 1 -> 2"):
        assert change in said
    assert f"stopped    after saving step {SECOND_STOP}; the same command goes on from there" in second
    assert any(line.startswith("done ") for line in third)


def test_elapsed_time_goes_on(interrupted):
    path = interrupted[0].directory / "metrics.jsonl"
    elapsed = [row["elapsed_seconds"] for row in read_rows(path)]
    assert all(before < after for before, after in zip(elapsed, elapsed[1:], strict=False))
    assert largest_before(path, SECOND_STOP, "elapsed_seconds") == elapsed[SECOND_STOP - 1]
    assert largest_before(path.with_name("nothing"), 7, "elapsed_seconds") == 0.0


def test_config_json_is_of_the_layout_that_ran_last(interrupted):
    written = json.loads((interrupted[0].directory / "config.json").read_text())
    assert written["mesh"]["fsdp"] == 8
    assert -1 not in written["mesh"].values()


def test_replicas_that_differ_resume_bit_by_bit_with_an_exchange_on_its_way(base):
    """DiLoCo, every=3, one step late: stopped after step 3, what is set aside then travels in the resumed run's first step."""
    config = replace(
        base,
        run_dir=base.run_dir + "_replicas",
        mesh=MeshConfig(replica=2, fsdp=4),
        sync=SyncConfig(mode="diloco", every=3, overlap=1),
        train=replace(base.train, steps=5, validate_every=5, sample_tokens=2),
    )
    whole = RecordingRun(validate(replace(config, run_dir=config.run_dir + "_whole"), 8), Said())
    parts = [RecordingRun(validate(config, 8), Said(), StopAt(3)), RecordingRun(validate(config, 8), Said())]
    assert [run.train() for run in (whole, *parts)] == [EXIT_DONE, EXIT_STOPPED, EXIT_DONE]
    rows, resumed = ([r for r in read_rows(run.directory / "metrics.jsonl")] for run in (whole, parts[0]))
    for name in ("loss", "grad_norm", "validation_loss", "exchanged_bytes"):
        values = [row[name] for row in rows if name in row]
        assert values == [row[name] for row in resumed if name in row], name
    assert [row["exchanged_bytes"] > 0 for row in rows if "loss" in row] == [False, False, False, True, False]
    assert any(line.startswith("replicas   diloco: a device sends") for line in whole.progress.lines)
    other = replace(config, mesh=MeshConfig(replica=4, fsdp=2))
    with pytest.raises(ExplainedError, match="mesh.replica: 2 -> 4"):
        RecordingRun(validate(other, 8), Said()).train()


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def refusal(config):
    """The message with which a run refuses to train; it must leave config.json as it was."""
    path = config.directory / "config.json"
    before = path.read_bytes()
    with pytest.raises(ExplainedError) as caught:
        RecordingRun(validate(config, 8), Said()).train()
    assert path.read_bytes() == before
    return str(caught.value)


def test_another_run_is_refused_with_every_difference(interrupted):
    config = interrupted[0].config
    other = replace(
        config,
        model=replace(config.model, embed_dim=24, num_layers=6),
        train=replace(config.train, seed=7),
        data=replace(config.data, validation_fraction=0.5),
    )
    message = refusal(other)
    for difference in (
        "model.embed_dim: 16 -> 24",
        "model.num_layers: 5 -> 6",
        "train.seed: 0 -> 7",
        "data.validation_fraction: 0.2 -> 0.5",
        "data fingerprint: ",
    ):
        assert difference in message
    assert "--run_dir" in message


def test_other_text_is_refused(interrupted, tmp_path):
    (tmp_path / "a.txt").write_text("something else entirely " * 100)
    (tmp_path / "b.txt").write_text("and some of it held out " * 100)
    config = interrupted[0].config
    source = replace(config.data.sources[0], path=f"{tmp_path}/*.txt")
    message = refusal(replace(config, data=replace(config.data, sources=(source,))))
    assert "data fingerprint: " in message
    assert "seed" not in message


def test_resume_never_refuses_a_folder_with_checkpoints(interrupted):
    config = interrupted[0].config
    message = refusal(replace(config, checkpoint=replace(config.checkpoint, resume="never")))
    assert "--checkpoint.resume=never" in message
    assert f"step {STEPS}" in message


def test_resume_required_needs_a_checkpoint(base, tmp_path):
    config = replace(base, run_dir=str(tmp_path), checkpoint=replace(base.checkpoint, resume="required"))
    with pytest.raises(ExplainedError, match="--checkpoint.resume=required, but .* holds no checkpoint"):
        RecordingRun(validate(config, 8), Said()).train()
    assert not (tmp_path / "config.json").exists()


def test_fewer_steps_than_are_saved_are_refused(interrupted):
    config = interrupted[0].config
    message = refusal(replace(config, train=replace(config.train, steps=20)))
    assert f"step {STEPS}" in message
    assert f"--train.steps={STEPS}" in message


def test_one_run_at_a_time_in_a_folder(tmp_path):
    make_run_dir(tmp_path)
    with only_run_in(tmp_path), pytest.raises(ExplainedError, match=r"process \d+ on .* is training in"), only_run_in(tmp_path):
        pass
    with only_run_in(tmp_path):
        pass


def test_a_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExplainedError, match="taken cannot be written: it is a file; give another --run_dir"):
        make_run_dir(tmp_path / "taken")


# ---------------------------------------------------------------------------------------------------------------------
# Ended by a threshold, with a trace and a sample


@pytest.fixture(scope="module")
def ended_early(base, uninterrupted):
    """A loss of 100 is reached at the first validation. No checkpoints. The train step is the one that is compiled already."""
    config = replace(
        base,
        run_dir=base.run_dir + "_early",
        train=replace(base.train, validate_every=6, stop_at_validation_loss=100.0, sample_tokens=6),
        checkpoint=replace(base.checkpoint, every=0),
        telemetry=TelemetryConfig(profile="2:3"),
    )
    run = RecordingRun(validate(config, 8), Said())
    return run, run.train()


def test_a_validation_threshold_ends_the_run(ended_early):
    run, exit_code = ended_early
    assert exit_code == EXIT_DONE
    rows = read_rows(run.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert 0 < rows[-1]["validation_loss"] < 100
    assert rows[-1]["validation_bits_per_byte"] > 0
    (done,) = [line for line in run.progress.lines if line.startswith("done ")]
    assert "train.stop_at_validation_loss=100.0" in done


def test_a_run_that_ended_at_its_threshold_has_nothing_left(base, uninterrupted):
    """Started again it trains no step, whatever its mesh; a lower threshold, and none, train on."""
    reached = replace(base, run_dir=base.run_dir + "_reached")
    train = replace(base.train, validate_every=3, stop_at_validation_loss=100.0)
    assert RecordingRun(validate(replace(reached, train=train), 8), Said()).train() == EXIT_DONE
    again = RecordingRun(validate(replace(other_layout(reached), train=replace(train, microbatches=2)), 8), Said())
    assert again.train() == EXIT_DONE
    assert again.batches == []
    (done,) = [line for line in again.progress.lines if line.startswith("done ")]
    assert "had reached train.stop_at_validation_loss=100.0 at step 3" in done
    for threshold, last in ((1e-9, 6), (0.0, 9)):
        further = replace(train, stop_at_validation_loss=threshold, steps=last)
        run = RecordingRun(
            validate(replace(reached, train=further, optimizer=replace(base.optimizer, warmup_steps=1)), 8), Said()
        )
        assert run.train() == EXIT_DONE
        assert len(losses_of(run)) == last


def losses_of(run):
    return [row["loss"] for row in read_rows(run.directory / "metrics.jsonl") if "loss" in row]


def test_validation_is_the_mean_over_all_held_out_targets(ended_early):
    """Sum over sum: a batch with fewer targets than another weighs less."""
    run, _ = ended_early
    logged = read_rows(run.directory / "metrics.jsonl")[-1]
    size, sums = run.config.train.global_batch_size, []
    step = make_evaluation_step(run.config, run.mesh, run.prepared.backend)
    for i in range(run.data.num_validation_batches(size)):
        batch = run.data.validation_batch(i, slice(0, size), size)
        sums.append(jax.device_get(step(run.state["params"], run.prepared.place(batch, size))))
    assert sum(s["targets"] for s in sums) == run.data.validation_tokens
    assert len({float(s["targets"]) for s in sums}) > 1
    mean = sum(float(s["loss"]) for s in sums) / run.data.validation_tokens
    assert logged["validation_loss"] == pytest.approx(mean, rel=1e-6)
    assert logged["validation_bits_per_byte"] == pytest.approx(run.data.bits_per_byte(mean), rel=1e-6)


def test_the_profile_window_writes_a_trace(ended_early):
    run, _ = ended_early
    traces = list((run.directory / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000
    assert [line for line in run.progress.lines if line.startswith("profile ")]


def test_the_model_goes_on_with_held_out_text(ended_early):
    run, _ = ended_early
    (said,) = [line for line in run.progress.lines if line.startswith("--- held-out text:")]
    prompt, _, continuation = said.partition("\n--- the model goes on:\n")
    assert any(word.strip() in prompt for word in WORDS)
    assert len(continuation.removesuffix("\n---").encode()) >= 1


def test_without_checkpoints_nothing_is_saved_and_a_stop_says_so(ended_early, base):
    run, _ = ended_early
    assert not (run.directory / "checkpoints").exists()
    said = Said()
    stopped = RecordingRun(replace(run.config, run_dir=base.run_dir + "_unsaved"), said, StopAt(2))
    assert stopped.train() == 128 + 15
    assert any(line.startswith("stopped    after step 2; nothing is saved") for line in said.lines)


def test_the_picture_is_drawn(ended_early):
    run, _ = ended_early
    assert (run.directory / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
