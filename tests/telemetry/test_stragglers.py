"""Who sets the pace: named from the figures, and in a real run where one process reads its data slowly."""

import json
import types

import numpy as np
import pytest

from jaxtrain.config import MESH_AXES
from jaxtrain.telemetry.heartbeat import innermost
from jaxtrain.telemetry.stragglers import Figures, crossing_axes, describe, find_straggler
from tests.launch.processes import started
from tests.lines import unstamped

SLOW_SECONDS = 1.0
CONFIG = f"""
import os, time
from pathlib import Path
from jaxtrain.config.loading import load_config
from jaxtrain.data.prefetch import Prefetcher

fast = Prefetcher.__next__

def slow(self):
    # Each batch takes many times what the step before took: on a busy machine, where steps are long, too.
    time.sleep(max({SLOW_SECONDS}, 10 * (time.monotonic() - getattr(self, "handed_out", float("inf")))))
    batch = fast(self)
    self.handed_out = time.monotonic()
    return batch

if os.environ.get("JAXTRAIN_PROCESS_ID") == "1":
    Prefetcher.__next__ = slow

def get_config():
    return load_config(Path("configs/quickstart.py"))
"""


def figures(*rows):
    """Of processes 0, 1, ...: (waiting, data) of steps of one second."""
    return {i: Figures(10, f"host{i}", 1.0, waiting, data) for i, (waiting, data) in enumerate(rows)}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(0.9, 0.0)], None),
        ([(0.98, 0.0), (0.97, 0.01), (0.99, 0.0)], None),
        ([(0.98, 0.0), (0.1, 0.9), (0.98, 0.0)], (1, 0.88)),
        ([(0.05, 0.0), (0.6, 0.0)], (0, 0.55)),
        ([(0.9, 0.0), (0.5, 0.4), (0.9, 0.0)], None),  # it reads while the devices work, and then waits like the others
    ],
)
def test_the_process_that_works_while_others_wait_is_named(rows, found):
    named = find_straggler(figures(*rows))
    assert named == (found if found is None else (found[0], pytest.approx(found[1])))


def test_words_say_what_it_does():
    slow_data = figures((0.98, 0.0), (0.1, 0.85), (0.98, 0.0))
    assert describe(slow_data, 1, 0.88, ["data"]) == (
        "the others wait 0.88 s of each step's 1 s for process 1 on host1, along data: it spends 0.9 s at work of its own "
        "(0.85 s for data, 0 s elsewhere)"
    )
    assert "its host is busy" in describe(figures((0.98, 0.0), (0.1, 0.0)), 1, 0.88, [])


def test_axes_that_lead_to_other_processes():
    owners = np.array([0, 0, 1, 1, 2, 2, 3, 3]).reshape(1, 2, 2, 1, 1, 1, 2)
    devices = np.vectorize(lambda owner: types.SimpleNamespace(process_index=owner), otypes=[object])(owners)
    mesh = types.SimpleNamespace(devices=devices, axis_names=MESH_AXES)
    assert crossing_axes(mesh, 1) == ["pipe", "data"]


def test_the_innermost_call_is_found(tmp_path):
    file = tmp_path / "process-0.stacks"
    assert innermost(file) == ""
    file.write_text(
        'Thread 0x1 (most recent call first):\n  File "/a/jaxtrain/telemetry/x.py", line 3 in f\n'
        '  File "/usr/threading.py", line 9 in _bootstrap\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/b/jax/array.py", line 30 in block_until_ready\n'
        '  File "/a/jaxtrain/train/loop.py", line 75 in _read\n  File "/a/jaxtrain/main.py", line 90 in <module>\n'
        '  File "<frozen runpy>", line 198 in _run_module_as_main\n'
    )
    assert innermost(file) == "train/loop.py:75 in _read"


def test_a_process_with_slow_data_is_named_in_the_log_and_the_rows(tmp_path):
    (tmp_path / "slow.py").write_text(CONFIG)
    flags = (
        f"--config={tmp_path / 'slow.py'} --model.num_layers=1 --model.embed_dim=32 --model.num_heads=2 --model.num_kv_heads=2 "
        "--model.head_dim=16 --model.mlp_dim=64 --model.vocab_size=257 --data.tokenizer=byte --data.sources.0.kind=synthetic "
        "--data.sequence_length=32 --data.prefetch=1 --train.global_batch_size=8 --train.steps=12 --train.log_every=4 "
        "--optimizer.warmup_steps=2 --train.validate_every=0 --train.sample_tokens=0 --mesh.data=2 --mesh.fsdp=1 "
        f"--checkpoint.every=0 --run_dir={tmp_path / 'run'}"
    ).split()
    with started(2, 1, flags, tmp_path) as both:
        assert [process.wait(200) for process in both] == [0, 0], (tmp_path / "0.log").read_text()[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if row["step"] == 12]
    assert last["straggler_process"] == 1
    assert 0 < last["straggler_seconds"] <= last["own_seconds_max"]
    assert last["own_seconds_max"] >= 0.75 * SLOW_SECONDS  # of the last four batches, one was taken before the row at step 8
    named = [line for line in unstamped((tmp_path / "0.log").read_text()).splitlines() if line.startswith("slow ")]
    assert named
    assert "for process 1 on " in named[-1]
    assert ", along data: " in named[-1]
