"""Where a start finds the disk of the checkpoints full: it goes on from one that is there, and refuses to begin without any."""

import errno
import os

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.checkpoint.stored import absolute, set_aside
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError


@pytest.fixture
def fill(tmp_path, monkeypatch):
    """From its call on no file of the folder can be written."""

    def fill(number):
        def fail(*arguments, **options):
            raise OSError(number, os.strerror(number))

        for name in ("write_text", "write_bytes"):
            monkeypatch.setattr(type(absolute(tmp_path)), name, fail)

    return fill


@pytest.fixture
def saved(tmp_path):
    with Checkpoints(tmp_path / "saved", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(4.0)}, {"config": {}}, wait=True)
    return tmp_path / "saved"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_restart_goes_on_from_its_checkpoint(saved, tmp_path, fill, caplog, number):
    fill(number)
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        assert checkpoints.step_to_resume() == 1
    assert "the run goes on from its checkpoint, and saves once there is space" in caplog.text
    with pytest.raises(CheckpointError, match="cannot write checkpoints into"):
        Checkpoints(saved, CheckpointConfig(on_failure="stop"))
    with pytest.raises(CheckpointError, match="cannot write checkpoints into"):
        Checkpoints(tmp_path / "fresh", CheckpointConfig())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_will_not_take_more_later_is_refused(saved, fill, number):
    fill(number)
    with pytest.raises(CheckpointError, match="cannot write checkpoints into"):
        Checkpoints(saved, CheckpointConfig())


def test_a_damaged_step_is_set_aside_without_its_note(saved, fill, caplog):
    fill(errno.ENOSPC)
    aside = set_aside(saved, 1, "damaged", "a bit flipped")
    assert aside.name == "1.damaged-1"
    assert not (saved / "1").exists()
    assert "cannot be written" in caplog.text
