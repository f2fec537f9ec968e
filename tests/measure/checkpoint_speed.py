"""How fast checkpoints are saved and restored, beside the speed of `dd` on the same disk in the same round.

    .venv/bin/python -m tests.measure.checkpoint_speed --folder=/tmp  # 1 GB of parameters and moments, one device

A save is waited for until it is committed, and both it and `dd` until the disk has the data (`sync`). `dd` reads into one small
buffer; a restore is also held against `readinto` of one array as large as the state, which is new memory to it.

Before each part the kernel drops the files from its cache (`posix_fadvise`), and as much memory as any part needs is touched
and freed. Without that (`--cold`), a virtual machine measures who comes after a deletion: pages that the hypervisor has to
supply take longer than the disk (512 MiB of them 1.9 to 2.2 s, where the disk takes 0.4), `dd` gets those of the file that it
wrote in the round before, and a save none. Prints medians of the rounds, in MB/s, and what of the others' speed each is.
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


def _prepare(folder: Path, size: int) -> None:
    """Drop the files from the page cache; have the kernel hold free pages for `size` bytes."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    np.empty(size, np.uint8)[::4096] = 1


def _dd(*arguments: str) -> None:
    subprocess.run(["dd", *arguments, "bs=16M"], check=True, capture_output=True)


def main() -> None:
    """Saves, restores and runs dd in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--arrays", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="touch no memory before the parts")
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
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    source, plain = folder / "source", folder / "plain"
    source.write_bytes(np.asarray(state["array_0"]).tobytes())

    def write() -> None:
        for _ in range(flags.arrays):
            _dd(f"if={source}", f"of={plain}", "oflag=append", "conv=notrunc")

    def read_whole() -> None:
        whole = memoryview(np.empty(size, np.uint8))
        with open(plain, "rb", buffering=0) as file:
            for start in range(0, size, 1 << 24):
                file.readinto(whole[start : start + (1 << 24)])

    try:
        with Checkpoints(folder / "checkpoints", CheckpointConfig(keep=1)) as checkpoints:
            parts = {
                "dd writes": write,
                "save": lambda: checkpoints.save(number, state, {}, wait=True),
                "dd reads": lambda: _dd(f"if={plain}", "of=/dev/null"),
                "readinto": read_whole,
                "restore": lambda: jax.block_until_ready(checkpoints.restore(number, abstract)),
            }
            found: dict[str, list[float]] = {name: [] for name in parts}
            for number in range(1, flags.rounds + 2):
                state = jax.block_until_ready(step(state))
                seconds = {}
                for name, part in parts.items():
                    _prepare(folder, 0 if flags.cold else 3 * size)
                    began = time.perf_counter()
                    part()
                    if name in ("dd writes", "save"):
                        os.sync()
                    seconds[name] = time.perf_counter() - began
                plain.unlink()
                if number > 1:  # the first compiles
                    for name, each in seconds.items():
                        found[name].append(size / each / 1e6)
                print(f"round {number}:", *(f"{name} {each:.2f} s" for name, each in seconds.items()), flush=True)
    finally:
        shutil.rmtree(folder)
    middle = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, beside in (("save", "dd writes"), ("restore", "dd reads"), ("restore", "readinto")):
        print(f"{name}: {middle[name]:.0f} MB/s; {beside} {middle[beside]:.0f} MB/s: {middle[name] / middle[beside]:.0%}")


if __name__ == "__main__":
    main()
