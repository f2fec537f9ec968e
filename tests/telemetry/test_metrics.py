import json
import math
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.telemetry.metrics import MetricsLog, read_rows


def lines(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def steps(run_dir):
    return [json.loads(line)["step"] for line in lines(run_dir)]


def write_steps(run_dir, numbers, **options):
    with MetricsLog(run_dir, **options) as log:
        for step in numbers:
            log.write({"step": step, "loss": 1.0 / step})


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": np.float32(2.5), "grad_norm": jnp.float32(0.5), "mfu_full": None, "note": "x"})
    assert json.loads(lines(tmp_path)[0]) == {"step": 1, "loss": 2.5, "grad_norm": 0.5, "mfu_full": None, "note": "x"}
    log.close()
    log.close()


def test_what_is_not_finite_is_null_and_said(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 3, "loss": math.nan, "grad_norm": -math.inf, "learning_rate": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert row == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 0.1,
        "not_finite": {"loss": "nan", "grad_norm": "-inf"},
    }


def test_resume_drops_what_will_be_logged_again(tmp_path):
    write_steps(tmp_path, [10, 20, 30, 40])
    with MetricsLog(tmp_path, start_step=20) as log:
        assert steps(tmp_path) == [10, 20]
        log.write({"step": 20, "validation_loss": 1.0})
        log.write({"step": 30, "loss": 0.5})
    assert steps(tmp_path) == [10, 20, 20, 30]
    assert read_rows(tmp_path / "metrics.jsonl")[-1] == {"step": 30, "loss": 0.5}


def test_a_new_run_in_an_old_folder_starts_an_empty_file(tmp_path):
    write_steps(tmp_path, [10, 20])
    write_steps(tmp_path, [5])
    assert steps(tmp_path) == [5]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-8])
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    write_steps(tmp_path, [3, 4], start_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_not_finite_row_survives_a_resume(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": math.inf})
    before = lines(tmp_path)
    MetricsLog(tmp_path, start_step=1).close()
    assert lines(tmp_path) == before


def test_only_process_0_writes(tmp_path):
    write_steps(tmp_path / "run", [1], process_index=1, wandb_project="nobody")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_directory_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExplainedError, match="cannot write .*metrics.jsonl.*--run_dir"):
        MetricsLog(tmp_path / "file" / "run")


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ExplainedError, match="No space left on device"):
        log.write({"step": 1})


def tensorboard_scalars(run_dir):
    """(tag, step, value) and the steps purged from, read from the event files."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, purges = [], []
    for file in sorted((run_dir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            if event.HasField("session_log"):
                purges.append(event.step)
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return scalars, purges


def test_tensorboard_gets_the_numbers_and_forgets_what_resume_redoes(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 7, "loss": 0.5, "mfu_full": None, "grad_norm": math.nan, "note": "x"})
    MetricsLog(tmp_path, start_step=5).close()
    scalars, purges = tensorboard_scalars(tmp_path)
    assert scalars == [("loss", 7, 0.5)]
    assert purges == [0, 6]


def test_wandb_without_the_package_or_the_key_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ExplainedError, match=r"needs the wandb package: pip install 'jaxtrain\[wandb\]'"):
        MetricsLog(tmp_path, wandb_project="p")
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ExplainedError, match="set WANDB_API_KEY"):
        MetricsLog(tmp_path, wandb_project="p")


def test_wandb_keeps_its_run_over_a_resume(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *arguments, **options):
            calls.append(("define_metric", arguments, options))

        def log(self, row):
            calls.append(("log", row))

        def finish(self):
            calls.append(("finish",))

    module = types.ModuleType("wandb")
    identities = []

    def init(**options):
        identities.append(options["id"])
        return Run()

    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 1):
        write_steps(tmp_path, [start + 1], start_step=start, wandb_project="p")
    assert identities[0] == identities[1]
    assert ("log", {"step": 2, "loss": 0.5}) in calls
    assert calls[-1] == ("finish",)
