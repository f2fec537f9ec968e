import json
import math
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError
from jaxtrain.telemetry.metrics import MetricsLog, read_rows
from jaxtrain.telemetry.tensorboard import METRICS, tag_of


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
    row = json.loads(lines(tmp_path)[0])
    assert abs(row.pop("time") - time.time()) < 3600
    assert row == {"step": 1, "loss": 2.5, "grad_norm": 0.5, "mfu_full": None, "note": "x"}
    log.close()
    log.close()


def test_what_is_not_finite_is_null_and_said(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 3, "loss": math.nan, "grad_norm": -math.inf, "learning_rate": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    del row["time"]
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
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.5


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
    write_steps(tmp_path / "run", [1], process_index=1, wandb_project="unused")
    assert not (tmp_path / "run").exists()


def test_logs_go_on_without_a_disk_and_have_every_row_at_last(tmp_path, disk):
    """One line for each file when it fails, one when it has what it lacked; no row is lost or written twice."""
    write_steps(tmp_path, [1, 2])
    said = []
    log = MetricsLog(tmp_path, start_step=2, say=said.append, config=Config())
    for step, room in ((3, 1 << 30), (4, 30), (5, 0), (6, 5)):
        disk.room = room
        log.write({"step": step, "loss": 1.0 / step})
    assert steps(tmp_path) == [1, 2, 3]
    disk.room = 1 << 30
    log.write({"step": 7, "loss": 1.0 / 7})
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert [step for _, step, _ in tensorboard_scalars(tmp_path)[0]] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(line.split()[0] for line in said) == ["warning", "warning", "written", "written"]


def test_logs_begin_without_a_disk(tmp_path, disk):
    said = []
    disk.room = 0
    log = MetricsLog(tmp_path / "run", say=said.append)
    log.write({"step": 1, "loss": 1.0})
    disk.room = 1 << 30
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert steps(tmp_path / "run") == [1, 2]
    assert [step for _, step, _ in tensorboard_scalars(tmp_path / "run")[0]] == [1, 2]


def test_only_tensorboard_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder belongs")
    said = []
    with MetricsLog(tmp_path, say=said.append) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert len(said) == 2
    assert all(line.startswith(f"warning    {tmp_path / 'tensorboard'}") for line in said)


def tensorboard_events(run_dir):
    """Read the event files, and check every record's length and checksums."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    for file in sorted((run_dir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
            assert masked_crc32c(data[12 : 12 + size]) == int.from_bytes(data[12 + size : 16 + size], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def tensorboard_scalars(run_dir):
    """(tag, step, value) and the steps purged from, read from the event files."""
    scalars, purges = [], []
    for event in tensorboard_events(run_dir):
        if event.HasField("session_log"):
            purges.append(event.step)
        scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value if not v.tag.startswith("_hparams_")]
    return scalars, purges


def test_tensorboard_gets_the_numbers_and_forgets_what_resume_redoes(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 7, "loss": 0.5, "mfu_full": None, "grad_norm": math.nan, "note": "x"})
    MetricsLog(tmp_path, start_step=5).close()
    scalars, purges = tensorboard_scalars(tmp_path)
    assert scalars == [("train/loss", 7, 0.5)]
    assert purges == [0, 6]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss_mean", "train/loss_mean"),
        ("loss_deviations", "train/loss_deviations"),
        ("validation_bits_per_byte", "validation/bits_per_byte"),
        ("expert_load_max", "moe/expert_load_max"),
        ("router_z_loss", "moe/router_z_loss"),
        ("tokens_per_second", "perf/tokens_per_second"),
    ],
)
def test_tensorboard_groups_its_tags(name, tag):
    assert tag_of(name) == tag


def test_tensorboard_shows_the_config_as_hyperparameters(tmp_path):
    """Read back by tensorboardX's own messages: the session's hyperparameters, by dotted name."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    MetricsLog(tmp_path, config=Config(run_dir="here")).close()
    found = {}
    for event in tensorboard_events(tmp_path):
        for value in event.summary.value:
            found[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    started = found["_hparams_/session_start_info"].session_start_info.hparams
    shown = {name: value.number_value or value.string_value for name, value in started.items()}
    expected = {"train.steps": Config().train.steps, "data.sources.0.kind": Config().data.sources[0].kind, "run_dir": "here"}
    assert {name: shown[name] for name in expected} == expected
    assert "model.moe" not in shown
    assert [metric.name.tag for metric in found["_hparams_/experiment"].experiment.metric_infos] == list(METRICS)


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
    logged = [call[1] for call in calls if call[0] == "log"]
    assert [(row["step"], row["loss"]) for row in logged] == [(1, 1.0), (2, 0.5)]
    assert calls[-1] == ("finish",)


def test_wandb_that_fails_in_the_midst_costs_one_warning(tmp_path, monkeypatch):
    class Run:
        def define_metric(self, *arguments, **options):
            pass

        def log(self, row):
            raise RuntimeError("its process has gone")

        def finish(self):
            raise OSError(28, "No space left on device")

    module, said = types.ModuleType("wandb"), []
    module.init = lambda **options: Run()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsLog(tmp_path, wandb_project="p", say=said.append) as log:
        log.write({"step": 1, "loss": 1.0})
        log.write({"step": 2, "loss": 1.0})
    assert len(said) == 1
    assert "the run at Weights & Biases cannot be written: RuntimeError: its process has gone" in said[0]
    assert steps(tmp_path) == [1, 2]

    def fail(**options):
        raise OSError(28, "No space left on device")

    module.init = fail
    MetricsLog(tmp_path, wandb_project="p", say=said.append).close()
    assert "Weights & Biases did not start" in said[1]
