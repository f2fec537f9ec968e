"""The program as its user meets it: real processes, a tiny corpus, Ctrl-C, resume, wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

CONFIG = """
from jaxtrain.config import *
def get_config():
    return Config(
        name="tiny",
        model=ModelConfig(num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, dtype="float32"),
        data=DataConfig(sources=(DataSource(kind="text", path=r"{text}"),), sequence_length=32, cache_dir=r"{cache}"),
        optimizer=OptimizerConfig(peak_lr=3e-3),
        train=TrainConfig(steps=60, global_batch_size=8, log_every=1, validate_every=30, compilation_cache=r"{cache}"),
        checkpoint=CheckpointConfig(every=25),
    )
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end_to_end")
    random = np.random.default_rng(0)
    words = ["layer", "mesh", "token", "shard", "stage", "loss"]
    for i in range(12):
        (folder / f"text{i}.txt").write_text(" ".join(random.choice(words, 900)))
    (folder / "tiny.py").write_text(CONFIG.format(text=folder / "text*.txt", cache=folder / "cache"))
    return folder


def start(workplace: Path, *flags: str) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxtrain.main", f"--config={workplace / 'tiny.py'}", *flags]
    return subprocess.Popen(
        command, cwd=workplace, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, output


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> dict[int, float]:
    found = [(row["step"], row["loss"]) for row in rows_of(run_dir) if "loss" in row]
    assert len(found) == len(dict(found)), "a step is logged twice"
    return dict(found)


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """A run that nothing interrupts."""
    code, output = finish(start(workplace, "--run_dir=whole"))
    assert code == 0, output
    return workplace / "whole"


def test_what_a_run_leaves_behind(whole: Path):
    losses = losses_of(whole)
    assert sorted(losses) == list(range(1, 61))
    assert losses[60] < losses[1] / 2
    row = next(row for row in rows_of(whole) if row["step"] == 30)
    assert {"grad_norm", "learning_rate", "tokens_per_second", "step_seconds"} <= set(row)
    validation = [row for row in rows_of(whole) if "validation_loss" in row]
    assert [row["step"] for row in validation] == [30, 60]
    assert validation[-1]["validation_bits_per_byte"] < validation[0]["validation_bits_per_byte"]
    assert json.loads((whole / "config.json").read_text())["mesh"]["fsdp"] == 1
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any((whole / "tensorboard").iterdir())
    assert sorted(p.name for p in (whole / "checkpoints").iterdir() if p.name.isdigit()) == ["25", "50", "60"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_the_same_command_goes_on_bit_for_bit(workplace: Path, whole: Path, number: signal.Signals):
    flags = (f"--run_dir=stopped_{number.name}",)
    run_dir = workplace / flags[0].removeprefix("--run_dir=")
    process = start(workplace, *flags)
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or len(rows_of(run_dir)) < 8:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 76, output
    stopped_at = max(losses_of(run_dir))
    assert stopped_at <= 40, "the rest is too short to compare"
    assert str(stopped_at) in {p.name for p in (run_dir / "checkpoints").iterdir()}
    code, output = finish(start(workplace, *flags))
    assert code == 0, output
    assert losses_of(run_dir) == losses_of(whole)


WRONG = {
    "unknown flag": (["--mesh.tensr=2"], 2, "tensor"),
    "ill-typed flag": (["--train.steps=many"], 2, "steps"),
    "impossible mesh": (["--mesh.fsdp=3"], 2, "1 is present"),
    "unbuilt axis": (["--mesh.context=2"], 2, "not built yet"),
    "no such files": (["--data.sources.0.path=nothing/*.txt"], 1, "nothing/"),
    "too small a vocabulary": (["--model.vocab_size=100"], 2, "257"),
    "unwritable folder": (["--run_dir=/proc/nowhere"], 1, "/proc/nowhere"),
    "another model on resume": (["--run_dir=whole", "--model.num_layers=4"], 1, "model.num_layers: 3 -> 4"),
    "another seed on resume": (["--run_dir=whole", "--train.seed=1"], 1, "train.seed: 0 -> 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_explained_without_a_traceback(workplace: Path, whole: Path, case: str):
    flags, expected_code, words = WRONG[case]
    code, output = finish(start(workplace, *(["--run_dir=wrong"] if not any("run_dir" in f for f in flags) else []), *flags))
    assert code == expected_code, output
    assert words in output
    assert not re.search(r"Traceback|File \"", output), output


def test_a_file_that_is_not_text_is_named(workplace: Path, whole: Path):
    (workplace / "broken.txt").write_bytes(b"good\xff\xfebad")
    code, output = finish(start(workplace, "--run_dir=wrong", f"--data.sources.0.path={workplace / 'broken.txt'}"))
    assert code == 1
    assert "broken.txt" in output
    assert "Traceback" not in output
