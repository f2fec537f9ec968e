"""Tokens a second from token files behind a URL, beside the same files on disk: `python -m tests.measure.store_rate`.

The store is moto's S3 server in a process of its own, on the loopback (`pip install 'moto[server]' s3fs`; MOTO_PYTHON names
the interpreter of the server): Python that shares this machine's cores and reads the whole object for each range, so all rates
are lower bounds. `rows` reads each row by itself, as of a file larger than the cache; `plain` is s3fs alone, asked for the same
ranges in as many threads; `cold` has the file fetched behind the rows; `warm` finds it in data.cache_dir.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, TrainConfig
from jaxtrain.data.pipeline import Data, open_data
from jaxtrain.data.store_path import StorePath

TOKENS, LENGTH, ROWS, BATCHES = 4_000_000, 2048, 32, 20
MOST_OF_ROW = 1 << 17
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Print the rates, and whether the batches are the same."""
    import fsspec

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 50_000, TOKENS, dtype=np.uint16))
        server = subprocess.Popen(
            [os.environ.get("MOTO_PYTHON", sys.executable), "-c", SERVER],
            env=os.environ | {"PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        address = next(line.strip() for line in server.stdout if line.startswith("http"))
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        store.put_file(str(folder / "ids.npy"), "bucket/ids.npy")
        try:
            here, file = _open(str(folder / "ids.npy"), folder / "here"), "s3://bucket/ids.npy"
            began = time.perf_counter()
            rows = _open(file, folder / "rows", 0)
            opened = time.perf_counter() - began
            same = here.fingerprint == rows.fingerprint and _same(here, rows)
            rates, asked = {"disk": _rate(here, 100)}, _recorded()
            rates["S3 rows"] = _rate(rows, 100)
            ranges = list(asked)
            rates["S3 plain"] = _plain_rate(store, ranges)
            asked.clear()
            cold = _open(file, folder / "cold")
            asked.clear()
            rates["S3 cold"] = _rate(cold, 100)
            while sum(stop - start for start, stop in asked if stop - start > MOST_OF_ROW) < 2 * TOKENS:
                time.sleep(0.1)
            time.sleep(1)  # the last blocks are being written
            rates["S3 warm"] = _rate(cold, 100)
        finally:
            server.kill()
    wanted = 2 * BATCHES * ROWS * LENGTH
    size = sum(stop - start for start, stop in ranges)
    print(f"rows: {len(ranges)} requests of {size / len(ranges):,.0f} bytes, {size / wanted:.3f} of the tokens' bytes")
    words = ", ".join(f"{way} {rate / 1e6:.2f}" for way, rate in rates.items())
    print(f"million tokens/s, rows of {LENGTH}, load {os.getloadavg()[0]:.1f}: {words}")
    print(f"opened, with its checksum and ids checked, in {opened:.1f} s; same fingerprint and batches: {same}")


def _recorded() -> list[tuple[int, int]]:
    """Return the list to which every range is added that a store is asked for from now on."""
    asked: list[tuple[int, int]] = []
    read = StorePath.read_ranges

    def recorded(self: StorePath, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        asked.extend(ranges)
        return read(self, ranges)

    StorePath.read_ranges = recorded
    return asked


def _plain_rate(store: Any, ranges: Sequence[tuple[int, int]]) -> float:
    """Return the tokens a second of s3fs, asked for the same ranges, a batch at a time in as many threads."""
    batches = [ranges[i : i + ROWS] for i in range(0, len(ranges), ROWS)][:BATCHES]

    def read(batch: Sequence[tuple[int, int]]) -> None:
        store.cat_ranges(["bucket/ids.npy"] * len(batch), *map(list, zip(*batch, strict=True)))

    began = time.perf_counter()
    with ThreadPoolExecutor(DataConfig().prefetch) as threads:
        list(threads.map(read, batches))
    return sum(map(len, batches)) * LENGTH / (time.perf_counter() - began)


def _open(path: str, cache: Path, gib: int = 16) -> Data:
    data = DataConfig((DataSource(kind="tokens", path=path),), "none", LENGTH, cache_dir=str(cache), store_cache_gib=gib)
    return open_data(Config(model=ModelConfig(vocab_size=50_000), data=data, train=TrainConfig(global_batch_size=ROWS)))


def _same(here: Data, there: Data) -> bool:
    batches = [(here.train_batch(step, slice(None)), there.train_batch(step, slice(None))) for step in range(5)]
    return all(np.array_equal(ours[name], theirs[name]) for ours, theirs in batches for name in ours)


def _rate(data: Data, first: int) -> float:
    with data.train_batches(first, slice(None)) as batches:
        began = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        return BATCHES * ROWS * LENGTH / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
