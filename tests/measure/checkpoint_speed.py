"""How fast checkpoints are saved and restored, beside the speed of `dd` on the same disk in the same round.

    .venv/bin/python -m tests.measure.checkpoint_speed --folder=/tmp  # 1 GB of parameters and moments, one device

A save is waited for until it is committed, and both it and `dd` until the disk has the data (`sync`). Before a restore, and
before `dd` reads, the kernel drops the files from its cache (`posix_fadvise`). Prints medians of the rounds, in MB/s, and what
of `dd`'s speed each is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu"}

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from jaxtrain.checkpoint import Checkpoints  # noqa: E402
from jaxtrain.config import CheckpointConfig  # noqa: E402


def _forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _dd(*arguments: str) -> None:
    subprocess.run(["dd", *arguments, "bs=16M"], check=True, capture_output=True)


def main() -> None:
    """Saves, restores and runs dd in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--arrays", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save; default a temporary folder")
    flags = parser.parse_args()
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    columns = flags.megabytes * 1_000_000 // (flags.arrays * 4 * 1024)
    random = jax.jit(lambda key: jax.random.normal(key, (1024, columns)), out_shardings=sharding)
    state = {f"array_{i}": random(jax.random.key(i)) for i in range(flags.arrays)}
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.0001, state), donate_argnums=0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    size = sum(leaf.nbytes for leaf in state.values())
    found: dict[str, list[float]] = {name: [] for name in ("dd writes", "save", "dd reads", "restore")}
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    source, plain = folder / "source", folder / "plain"
    source.write_bytes(np.asarray(state["array_0"]).tobytes())
    try:
        with Checkpoints(folder / "checkpoints", CheckpointConfig(keep=1)) as checkpoints:
            for number in range(1, flags.rounds + 2):
                state = jax.block_until_ready(step(state))
                began = time.perf_counter()
                for _ in range(flags.arrays):
                    _dd(f"if={source}", f"of={plain}", "oflag=append", "conv=notrunc")
                os.sync()
                written = time.perf_counter()
                checkpoints.save(number, state, {}, wait=True)
                os.sync()
                saved = time.perf_counter()
                _forget(folder)
                forgotten = time.perf_counter()
                _dd(f"if={plain}", "of=/dev/null")
                read = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(number, abstract))
                seconds = (written - began, saved - written, read - forgotten, time.perf_counter() - read)
                plain.unlink()
                if number > 1:  # the first compiles
                    for name, each in zip(found, seconds, strict=True):
                        found[name].append(size / each / 1e6)
                print(
                    f"round {number}:", *(f"{name} {each:.2f} s" for name, each in zip(found, seconds, strict=True)), flush=True
                )
    finally:
        shutil.rmtree(folder)
    middle = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, beside in (("save", "dd writes"), ("restore", "dd reads")):
        print(f"{name}: {middle[name]:.0f} MB/s; {beside} {middle[beside]:.0f} MB/s: {middle[name] / middle[beside]:.0%}")


if __name__ == "__main__":
    main()
