"""What a precision costs in loss, beside how far runs of the same precision are apart.

    .venv/bin/python -m tests.measure.loss_of_precision --steps=800 --runs=4 float32 bfloat16 float32+int8-moments

A decoder of 2 layers learns the bytes of the standard library's modules (512 tokens a step, AdamW), on one thread of a CPU. The
runs of a precision have the same data, and initial weights that differ by one part in 1,000: a difference between precisions
counts only where it is larger than that between such runs. Prints the mean loss on held-out bytes, and its standard error.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import replace
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402
from jaxtrain.mesh import make_mesh  # noqa: E402
from jaxtrain.train.gradients import batch_names, batch_sharding, make_evaluation_step  # noqa: E402
from jaxtrain.train.optimizer import optimizer_of  # noqa: E402
from jaxtrain.train.state import create_state  # noqa: E402
from jaxtrain.train.step import compile_train_step, place_numbers  # noqa: E402

TOKENS, LENGTH, HELD_OUT = 512, 128, 72  # of the last, batches
DTYPES = ("float32", "bfloat16", "float8")


def config_of(precision: str, steps: int, rate: float, width: int) -> Config:
    """Return the config of "float32", "bfloat16" or "float8", perhaps with "+int8-moments"."""
    dtype, *more = precision.split("+")
    if dtype not in DTYPES or more not in ([], ["int8-moments"]):
        raise SystemExit(f"precision {precision!r}: {', '.join(DTYPES)}, each perhaps with +int8-moments")
    model = ModelConfig(
        num_layers=2,
        embed_dim=width,
        num_heads=2,
        num_kv_heads=2,
        head_dim=width // 2,
        mlp_dim=3 * width,
        vocab_size=256,
        dtype="float32" if dtype == "float32" else "bfloat16",
    )
    if dtype == "float8":
        model = replace(model, matmul_dtype="float8")
    optimizer = OptimizerConfig(peak_lr=rate, warmup_steps=50, moments_dtype="int8" if more else "float32")
    train = TrainConfig(steps=steps, global_batch_size=TOKENS // LENGTH, remat="none")
    return Config(model=model, data=DataConfig(sequence_length=LENGTH, mask_documents=False), optimizer=optimizer, train=train)


def held_out_losses(config: Config, runs: int) -> list[float]:
    """Return the loss on held-out bytes of each run."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    cut = len(ids) - 40 * 1024
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:1]), optimizer_of(config)
    step = compile_train_step(config, mesh, optimizer, "blockwise")
    evaluate, numbers = make_evaluation_step(config, mesh, "blockwise"), place_numbers(config, mesh)

    def batch(starts: np.ndarray) -> dict[str, jax.Array]:
        rows = starts[:, None] + np.arange(LENGTH)
        places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape)
        arrays = {"tokens": ids[rows], "targets": ids[rows + 1], "positions": places}
        return jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))

    losses = []
    for run in range(runs):
        random, key = np.random.default_rng(7), jax.random.key(1000 + run)
        state = create_state(config, mesh, optimizer)
        noise = lambda x, key=key: 1 + 1e-3 * jax.random.normal(key, x.shape, x.dtype)  # noqa: E731
        state["params"] = jax.tree.map(lambda x, noise=noise: x * noise(x) if x.ndim > 1 else x, state["params"])
        for _ in range(config.train.steps):
            state, _ = step(state, batch(random.integers(0, cut - LENGTH - 1, TOKENS // LENGTH)), numbers)
        starts = np.arange(cut, cut + HELD_OUT * TOKENS, LENGTH).reshape(HELD_OUT, -1)
        sums = [evaluate(state["params"], batch(each)) for each in starts]
        losses.append(float(sum(s["loss"] for s in sums) / sum(s["targets"] for s in sums)))
    return losses


def main() -> None:
    """Train every precision, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="+", help="float32, bfloat16, float8, each perhaps with +int8-moments")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--width", type=int, default=64)
    flags = parser.parse_args()
    first = None
    for precision in flags.precisions:
        losses = held_out_losses(config_of(precision, flags.steps, flags.rate, flags.width), flags.runs)
        mean = statistics.mean(losses)
        first = first or mean
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
        words = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{precision:24} {mean:.4f} +- {error:.4f}, {mean / first - 1:+.2%} of the first ({words})", flush=True)


if __name__ == "__main__":
    main()
