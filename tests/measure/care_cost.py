"""What a run pays for being careful: each kind of care against a bare step of the same config, in turn in one process.

    .venv/bin/python -m tests.measure.care_cost                                            # the quickstart, one device
    .venv/bin/python -m tests.measure.care_cost --config=configs/1b.py --mesh.fsdp=8  # any config, on GPUs

Steps with guard.non_finite=skip (the update is decided on the device), with train.ema_decay, and on GPUs with
train.deterministic are whole programs of their own, so their price is a ratio of steps. A comparison of copies (guard.copies,
before every save) and a snapshot of the fast tier (checkpoint.fast_every) come now and then: their price is in steps, to be
divided by how often.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint.fast import FastTier
from jaxtrain.command import parse_config
from jaxtrain.config.rules import validate
from jaxtrain.measure.bench import Bench, bench_config
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import state_dims
from jaxtrain.train.state_check import make_check

ROUNDS, STEPS = 7, 4


def seconds_of(call: Any) -> float:
    """Until it returns."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(arguments: list[str]) -> None:
    """Measures, and prints medians over the rounds."""
    config = parse_config(arguments or ["--config=configs/quickstart.py"])
    config = validate(bench_config(config), jax.device_count())
    on_gpu = jax.devices()[0].platform in ("gpu", "cuda")
    kinds = {
        "a bare step": config,
        "guard.non_finite=skip": replace(config, guard=replace(config.guard, non_finite="skip", spike="skip")),
        "train.ema_decay": replace(config, train=replace(config.train, ema_decay=0.999)),
    }
    if on_gpu:
        kinds["train.deterministic"] = replace(config, train=replace(config.train, deterministic=True))
    benches = {name: Bench(each) for name, each in kinds.items()}
    plain = benches["a bare step"]
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    check = make_check(plain.mesh, state_dims(config, optimizer))
    jax.block_until_ready(check(plain.state))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(plain.state))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, tempfile.TemporaryDirectory() as run_dir:
        fast = FastTier(Path(memory), Path(run_dir), lambda: "[]")
        for number in range(1, ROUNDS + 1):
            for name, bench in benches.items():
                found.setdefault(name, []).extend(bench.bare_steps(STEPS))
            check_seconds = seconds_of(lambda: jax.block_until_ready(check(plain.state)))
            found.setdefault("a comparison of copies", []).append(check_seconds)
            snapshot_seconds = seconds_of(lambda step=number: fast.save(step, plain.state, {}))
            found.setdefault("a snapshot, until training goes on", []).append(snapshot_seconds)
            found.setdefault("a snapshot, until it is whole", []).append(snapshot_seconds + seconds_of(fast.wait))
    medians = {name: statistics.median(times) for name, times in found.items()}
    step = medians["a bare step"]
    devices = f"{plain.mesh.devices.size} x {jax.devices()[0].platform}"
    print(f"{config.name} on {devices}, state of {size / 1e6:,.0f} MB")
    for name, value in medians.items():
        print(f"  {name:<36} {value:8.4f} s = {value / step:6.3f} steps")


if __name__ == "__main__":
    main(sys.argv[1:])
