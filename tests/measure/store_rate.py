"""Tokens a second from token files behind a URL, beside the same files on disk: `python -m tests.measure.store_rate`.

The store is moto's S3 server in a process of its own, on the loopback (`pip install 'moto[server]' s3fs`): Python that
shares this machine's cores, so its rate is a lower bound. `cold` fetches every block, `warm` finds them in data.cache_dir.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, TrainConfig
from jaxtrain.data.pipeline import Data, open_data

TOKENS, LENGTH, ROWS, BATCHES = 20_000_000, 2048, 32, 40
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
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = next(line.strip() for line in server.stdout if line.startswith("http"))
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        store.put_file(str(folder / "ids.npy"), "bucket/ids.npy")
        try:
            here = _open(str(folder / "ids.npy"), folder / "here")
            began = time.perf_counter()
            there = _open("s3://bucket/ids.npy", folder / "there")
            opened = time.perf_counter() - began
            same = here.fingerprint == there.fingerprint and _same(here, there)
            rates = {"disk": _rate(here, 100), "S3 cold": _rate(there, 100), "S3 warm": _rate(there, 100)}
        finally:
            server.kill()
    words = ", ".join(f"{way} {rate / 1e6:.2f}" for way, rate in rates.items())
    print(f"million tokens/s, rows of {LENGTH}, load {os.getloadavg()[0]:.1f}: {words}")
    print(f"opened, with its checksum and ids checked, in {opened:.1f} s; same fingerprint and batches: {same}")


def _open(path: str, cache: Path) -> Data:
    data = DataConfig((DataSource(kind="tokens", path=path),), "none", LENGTH, cache_dir=str(cache))
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
