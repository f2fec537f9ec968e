"""Replay: a recorded step comes out the same again, on any mesh; a layer that was tampered with is named."""

import dataclasses
import json

import numpy as np
import pytest

from jaxtrain.command import parse_config
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import CheckpointError, ConfigError, UsageError
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.train import replay
from jaxtrain.verbs import replay as verb
from jaxtrain.verbs import train
from tests.launch.processes import started

FLAGS = (
    "--config=configs/quickstart.py --model.num_layers=3 --model.embed_dim=16 --model.num_heads=2 --model.num_kv_heads=2 "
    "--model.head_dim=8 --model.mlp_dim=32 --model.vocab_size=257 --data.tokenizer=byte --data.sources.0.kind=synthetic "
    "--data.sequence_length=16 --train.global_batch_size=16 --train.log_every=1 --train.validate_every=0 "
    "--train.sample_tokens=0 --train.steps=5 --checkpoint.every=3 --optimizer.warmup_steps=2 "
    "--model.dtype=float32"
).split()
MESH = ["--mesh.fsdp=8"]
OTHER = "mesh.pipe=2,mesh.fsdp=2,mesh.tensor=2,train.microbatches=2"
NEAR = "mesh.data=8,mesh.fsdp=1"
THINGS = ["the embedding", "layer 0", "layer 1", "layer 2", "the loss", "gradients of the head"] + [
    f"gradients of {what}" for what in ("layer 2", "layer 1", "layer 0", "the embedding")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The flags of a run of five steps, of which the third and the last are saved."""
    flags = [*FLAGS, *MESH, f"--run_dir={tmp_path_factory.mktemp('run') / 'run'}"]
    assert train.main(flags) == 0
    return flags


def said(capsys, arguments):
    """(exit code, what was said as JSON)"""
    capsys.readouterr()
    code = verb.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_step_is_as_it_was_recorded(run, capsys):
    """From the third step's checkpoint, over a step that has none."""
    code, found = said(capsys, [*run, "--step=5"])
    assert (code, found["same"]) == (0, True)
    assert "from the checkpoint of step 3" in found["title"]
    assert [row["what"] for row in found["differences"]] == ["the loss", "the gradient norm"]
    assert all(row["difference"] < 1e-6 for row in found["differences"])


def test_a_record_that_says_otherwise_is_a_difference(run, capsys, monkeypatch):
    monkeypatch.setattr(replay, "recorded", lambda config, step: {"loss": 5.0, "grad_norm": float("nan")})
    assert verb.main([*run, "--step=1", "--tolerance=0.01"]) == 1  # from the initial state
    printed = capsys.readouterr().out
    assert "first to differ: the loss, by 0." in printed
    assert "the initial state" in printed.replace("\n", " ")
    assert "inf" in printed


def test_another_mesh_gives_the_same_in_every_layer(run, capsys):
    code, found = said(capsys, [*run, "--step=4", f"--against={OTHER}"])
    assert code == 0
    assert [row["what"] for row in found["differences"]] == THINGS
    assert all(row["difference"] < 1e-5 for row in found["differences"])


def test_two_processes_replay_what_one_has_run(run, tmp_path):
    """One device each, in two layouts that cross them; the first of them says what came out, and both end alike."""
    flags = [flag for flag in run if not flag.startswith("--mesh")]
    layouts = ["--mesh.fsdp=2", "--against=mesh.fsdp=1,mesh.tensor=2", "--step=4", "--json"]
    with started(2, 1, [*flags, *layouts], tmp_path, verb="replay") as both:
        assert [process.wait(200) for process in both] == [0, 0], (tmp_path / "0.log").read_text()[-2000:]
    found = json.loads((tmp_path / "0.log").read_text().splitlines()[-1])
    assert [row["what"] for row in found["differences"]] == THINGS
    assert all(row["difference"] < 1e-5 for row in found["differences"])
    assert "differences" not in (tmp_path / "1.log").read_text()


def test_a_layer_with_a_damaged_weight_is_named(run, capsys, monkeypatch):
    """One number of 512 in one of the two layouts, in the last of its matrices, so that nothing before it is changed."""
    take = replay.ReplayedLayout.take

    def damaged(self, other, state):
        state = take(self, other, state)
        numbers = make_stacking(self.config).layer_numbers()
        place = tuple(np.argwhere(numbers == 1)[0])
        down = state["params"]["layers"]["mlp"]["down"]
        state["params"]["layers"]["mlp"]["down"] = down.at[(*place, 3, 4)].add(1.0)
        return state

    monkeypatch.setattr(replay.ReplayedLayout, "take", damaged)
    assert verb.main([*run, "--step=4", f"--against={NEAR}"]) == 1
    assert "first to differ: layer 1, by " in capsys.readouterr().out


def test_a_gradient_that_goes_wrong_is_named(run):
    """Of two computations that agree up to the loss, the layer nearest to the loss is where the backward pass went wrong."""
    config = validate(parse_config(run), 8)
    layout, data = replay.ReplayedLayout(config), open_data(config)
    state, _ = layout.state_before(1, data)
    batch = layout.batch(data, 0)
    one = layout.moments(state, batch)
    table = np.asarray(state["params"]["outer"]["table"])
    x = table[np.asarray(data.train_batch(0, slice(0, 16))["tokens"])].astype(np.float64)
    assert one.moments[0] == pytest.approx(np.stack([x.mean((0, 1)), np.square(x).mean((0, 1))]), rel=1e-4, abs=1e-7)
    wrong = {name: leaf.copy() for name, leaf in one.gradients.items()}
    wrong["layers/attention/value"][:2] *= 1.5  # of layers 0 and 1
    other = dataclasses.replace(one, gradients=wrong)
    found = [each for each in replay.differences(one, other) if each.difference > 1e-3]
    assert [(each.what, each.where) for each in found] == [
        ("gradients of layer 1", "layers/attention/value"),
        ("gradients of layer 0", "layers/attention/value"),
    ]
    assert replay.differences(one, dataclasses.replace(one, loss=float("nan")))[4].difference == float("inf")


def test_bfloat16_is_near_and_not_the_same(run, capsys):
    code, found = said(capsys, [*run, "--step=4", "--against=model.dtype=bfloat16"])
    assert (code, found["tolerance"]) == (0, 0.05)
    assert max(row["difference"] for row in found["differences"]) > 1e-4


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ([], ConfigError, "--step is missing"),
        (["--step=0"], UsageError, "--step=0: give the number of a step"),
        (["--step=77"], UsageError, r"--step=77 has no row .*steps near it: 2, 3, 4, 5"),
        (["--step=4", "--against=tensor"], UsageError, "--against='tensor': give flags over the config"),
        (["--step=4", "--against=mesh.fsdp=3"], ConfigError, "fsdp=3"),
        (["--step=4", "--tolerance=2"], UsageError, "--tolerance=2"),
        (["--step=4", "--sync.mode=delayed", "--mesh.fsdp=4", "--mesh.replica=2"], UsageError, "sync.mode=delayed"),
        (["--step=4", "--train.seed=1"], CheckpointError, "train.seed: 0 -> 1"),
    ],
)
def test_wrong_usage_is_explained(run, flags, error, words):
    with pytest.raises(error, match=words):
        verb.main([*run, *flags])
