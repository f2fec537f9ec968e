"""What is read of run folders: whole ones, ones under way, broken ones, of any name and kind."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain.config import Config, Stage, to_json
from jaxtrain.errors import UsageError
from jaxtrain.report.runs import differing_fields, read_run, read_runs
from jaxtrain.telemetry.flops import model_flops_per_token
from tests.tiny import tiny

CONFIG = tiny(train={"steps": 100})
LOG = """2026-11-29 20:05:22 run        one in runs/one
2026-11-29 20:05:24 resume     from step 40 of runs/one
2026-11-29 20:05:30 step 50/100 | loss 2.5
2026-11-29 20:05:31 rollback   step 60: its loss is nan (batch 59); back to step 40
2026-11-29 20:05:32 warning    runs/one/metrics.jsonl cannot be written
2026-11-29 20:05:40 done       all 100 steps
2026-11-29 20:05:41 --- held-out text:
def f(x):
--- the model goes on:
    return <x> & y
---
"""


def row(step: int, **values: Any) -> dict[str, Any]:
    whole = {"time": 1e9 + step, "step": step, "loss": 5 / step, "tokens": 64 * step, "elapsed_seconds": 0.5 * step}
    return whole | {"step_seconds_mean": 0.4, "learning_rate": 1e-3} | values


def write_run(folder: Path, config: Config | None = CONFIG, rows: list[dict[str, Any]] | None = None, log: str = LOG) -> Path:
    folder.mkdir(parents=True)
    rows = [row(step) for step in range(1, 101)] if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in rows))
    (folder / "log.txt").write_text(log)
    if config:
        (folder / "config.json").write_text(to_json(config))
    start = {"time": "2026-11-29T20:05:20+0000", "host": "here", "jaxtrain": "1.0", "git": "abc"}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    return folder


def test_a_run_is_read(tmp_path: Path):
    run = read_run(write_run(tmp_path / "one"), "one")
    assert [event.kind for event in run.events] == ["start", "resume", "rollback", "warning", "done"]
    assert [event.step for event in run.events] == [None, 40, 60, None, None]
    assert run.sample == "\ndef f(x):\n--- the model goes on:\n    return <x> & y".strip("\n")
    assert (run.state(), run.starts, run.last("loss")) == ("done, 100 steps", 1, 0.05)
    assert run.goodput == pytest.approx(0.8)  # 0.4 of 0.5 s a step


def test_curves_have_three_axes(tmp_path: Path):
    rows = [*(row(step) for step in (10, 20, 30)), {"step": 25, "validation_loss": 2.0}, row(40, loss=None)]
    run = read_run(write_run(tmp_path / "one", rows=rows), "one")
    x, y = run.curve("loss", "tokens")
    assert (x.tolist(), y.tolist()) == ([640, 1280, 1920], [0.5, 0.25, 5 / 30])
    assert run.curve("validation_loss", "tokens")[0].tolist() == [1600]
    assert run.curve("validation_loss", "time")[0].tolist() == [12.5]
    flops = 1600 * model_flops_per_token(CONFIG.model, CONFIG.data.sequence_length, "causal")
    assert run.curve("validation_loss", "flops")[0].tolist() == [flops]
    assert run.curve("no such key", "tokens")[0].size == 0


def test_flops_go_by_the_lengths_of_stages(tmp_path: Path):
    """40 steps of 4 x 16 tokens, then rows twice as long."""
    config = tiny(train={"steps": 100, "global_batch_size": 4}, data={"sequence_length": 16})
    staged = replace(config, train=replace(config.train, stages=(Stage(from_step=40, sequence_length=32),)))
    tokens = {40: 40 * 64, 60: 40 * 64 + 20 * 128}
    run = read_run(write_run(tmp_path / "one", staged, [row(step, tokens=count) for step, count in tokens.items()]), "one")
    short, long = (model_flops_per_token(config.model, length, "causal") for length in (16, 32))
    assert run.curve("loss", "flops")[0].tolist() == [2560 * short, 2560 * short + 2560 * long]


def test_stages_and_the_supervisor(tmp_path: Path):
    rows = [row(step, stage=step // 40) for step in range(10, 101, 10)]
    folder = write_run(tmp_path / "one", rows=rows)
    (folder / "launch").mkdir()
    ends = [
        {"time": 1.0, "event": "start", "productive": 0.0, "seconds": 0.1},
        {"time": 2.0, "event": "end", "kind": "failed", "words": "process 1 was ended by SIGKILL", "furthest": 30},
        {"time": 3.0, "event": "end", "kind": "done", "words": "done", "productive": 9.0, "seconds": 12.0},
    ]
    (folder / "launch" / "events.jsonl").write_text("".join(json.dumps(end) + "\n" for end in ends) + '{"time": 4.0, "ev')
    run = read_run(folder, "one")
    assert run.stages() == [(0, "0"), (40, "1"), (80, "2")]
    assert run.goodput == 0.75
    assert [(e.words, e.step) for e in run.events if e.kind == "supervisor"] == [
        ("process 1 was ended by SIGKILL, at step 30", 30)
    ]


def test_differences_are_the_fields_that_differ(tmp_path: Path):
    other = replace(CONFIG, name="other", optimizer=replace(CONFIG.optimizer, peak_lr=1e-2))
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", other), write_run(tmp_path / "c", None)]
    runs = read_runs([*map(str, folders), str(folders[0])])
    assert [run.name for run in runs] == ["a", "b", "c"]
    assert differing_fields(runs) == {"optimizer.peak_lr": [3e-4, 1e-2, None]}
    assert (runs[2].config, runs[2].parameters(), runs[2].curve("loss", "flops")[0].size) == (None, None, 0)


def test_broken_and_unfinished_folders(tmp_path: Path):
    folder = write_run(tmp_path / os.fsdecode(b"caf\xe9"), rows=[row(step) for step in range(1, 5)], log="")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 1.\xff')
    (folder / "config.json").write_text('{"model": ')
    (folder / "starts.jsonl").write_text('{"time": "yesterday"}\n[1]\n{"ti')
    (run,) = read_runs([str(folder)])
    assert (run.name, run.steps, run.events, run.config) == ("caf\\udce9", 4, [], None)
    assert run.state().startswith("step 4, ")
    never = write_run(tmp_path / "never", rows=[], log="")
    (run,) = read_runs([str(never)])
    assert (run.state(), run.goodput, run.sample) == ("no step logged", None, "")
    assert run.place(np.array([1.0]), "tokens").size == 0
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(UsageError, match="is no folder of a run"):
            read_runs([str(tmp_path / name)])


def test_folders_of_one_name_are_told_apart(tmp_path: Path):
    folders = [str(write_run(tmp_path / part / "run")) for part in "ab"]
    assert [run.name for run in read_runs(folders)] == folders
