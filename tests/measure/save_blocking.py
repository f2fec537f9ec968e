"""How long a save in the background keeps training waiting, and how long the same save takes when it is waited for.

    .venv/bin/python -m tests.measure.save_blocking  # 400 MB, 8 fake devices, all replicated twice

The parameters of both are made anew before every save, as a step does. Prints the medians, and their quotient; the issue
asks for less than 5%.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

# Compiled as a run compiles, not as tests do: the checksum is part of what blocks.
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import jax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from jaxtrain.checkpoint import Checkpoints  # noqa: E402
from jaxtrain.config import CheckpointConfig  # noqa: E402


def main() -> None:
    """Saves in turn with and without waiting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; default a temporary folder")
    flags = parser.parse_args()
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    columns = flags.megabytes * 1_000_000 // (10 * 4 * 1024)
    random = jax.jit(lambda key: jax.random.normal(key, (1024, columns)), out_shardings=sharding)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.0001, state), donate_argnums=0)
    state = {f"array_{i}": random(jax.random.key(i)) for i in range(10)}
    blocked, whole = [], []
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    try:
        with Checkpoints(folder, CheckpointConfig(keep=1)) as checkpoints:
            for number in range(1, 2 * flags.rounds + 3):
                state = jax.block_until_ready(step(state))
                started = time.perf_counter()
                checkpoints.save(number, state, {}, wait=number % 2 == 0)
                seconds = time.perf_counter() - started
                checkpoints.wait()
                if number > 2:  # the first two compile
                    (whole if number % 2 == 0 else blocked).append(seconds)
                print(f"save {number}: returned after {seconds:.3f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    one, other = statistics.median(blocked), statistics.median(whole)
    print(f"{flags.megabytes} MB: blocks {one:.3f} s; waited for, it takes {other:.2f} s: {one / other:.1%}")


if __name__ == "__main__":
    main()
