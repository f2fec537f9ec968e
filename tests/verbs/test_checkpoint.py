"""`jaxtrain checkpoint`: what a person does with the checkpoints of a run."""

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import Checkpoints, committed_steps
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError, ConfigError, UsageError
from jaxtrain.verbs.checkpoint import main


@pytest.fixture
def run(tmp_path):
    """A run's folder with steps 1, 2 and 3; arrays of step 3 have a flipped bit."""
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=9)) as checkpoints:
        for step in (1, 2, 3):
            state = {"params": {"w": jnp.arange(4096.0) * step, "b": jnp.ones(8)}, "step": jnp.int32(step)}
            checkpoints.save(step, state, {"config": {"mesh": {"fsdp": 1, "data": step}}})
    for data in (tmp_path / "checkpoints" / "3" / "state").glob("**/d/*"):
        data.write_bytes(b"")
    return tmp_path


def test_list(run, capsys):
    (run / "checkpoints" / "2.damaged-1").mkdir()
    assert main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "2.damaged-1", "3"]
    assert "whole" in lines[1]
    assert lines[1].endswith("data=2")
    assert "set aside" in lines[2]


def test_verify_tells_the_whole_from_the_damaged(run, capsys):
    assert main(["verify", f"{run}:2"]) == 0
    assert "step 2: 3 arrays, 16.0 KiB: as they were saved" in capsys.readouterr().out
    assert main(["verify", str(run), "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [("DAMAGED" in line) for line in lines] == [False, False, True]


def test_inspect_and_diff(run, capsys):
    assert main(["inspect", f"{run}:1"]) == 0
    assert "params/w" in capsys.readouterr().out
    assert main(["diff", f"{run}:1", f"{run}:1"]) == 0
    assert main(["diff", f"{run}:1", f"{run}:2"]) == 1
    said = capsys.readouterr().out
    assert "mesh.data: 1 -> 2" in said
    assert "params/w: relative distance 1.000e+00" in said
    assert "params/b" not in said.partition("mesh.data")[2]


def test_prune(run):
    assert main(["prune", str(run), "--keep=1", "--keep-every=1", "--dry-run"]) == 0
    assert main(["prune", str(run), "--keep=1", "--dry-run"]) == 0
    assert committed_steps(run / "checkpoints") == [1, 2, 3]
    assert main(["prune", str(run), "--keep=2"]) == 0
    assert committed_steps(run / "checkpoints") == [2, 3]
    with pytest.raises(CheckpointError, match="keep at least 1"):
        main(["prune", str(run), "--keep=0"])


def test_a_step_or_folder_that_is_not_there(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        main(["verify", f"{run}:7"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="elsewhere is no folder"):
        main(["list", str(tmp_path / "elsewhere")])
    with pytest.raises(CheckpointError, match="empty holds no checkpoint"):
        main(["list", str(tmp_path / "empty")])


def test_wrong_usage(run, capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("list", "verify", "inspect", "diff", "prune"))
    for arguments, error, words in (
        (["lst", "x"], UsageError, "did you mean 'list'"),
        (["list"], ConfigError, "FOLDER is missing"),
        (["diff", "x"], ConfigError, "OTHER is missing"),
        (["prune", "x"], ConfigError, "--keep is missing"),
        (["prune", "x", "--kep=3"], ConfigError, "did you mean --keep"),
        (["list", "x", "y"], ConfigError, "y: flags begin with --"),
    ):
        with pytest.raises(error, match=words):
            main(arguments)
