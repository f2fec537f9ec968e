"""How many tokens a second one process reads from token files, beside a plain copy: `python -m tests.measure.input_rate`.

The files are 100 million random ids in documents of 500 on average, 5% of them held out, in the page cache. `plain` gathers the
same windows with numpy and does nothing else; `batches` is `Data.train_batch`, `ahead` the same through the prefetching thread.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, TrainConfig
from jaxtrain.data.pipeline import Data, open_data

TOKENS, READ, SHAPES = 100_000_000, 8_000_000, ((256, 64), (512, 32), (2048, 16), (8192, 8))


def main() -> None:
    """Print a line for each shape of a batch."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; million tokens/s")
    print("rows x length   plain  batches  ahead  us a batch")
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        ids = random.integers(1, 50_000, TOKENS, dtype=np.uint16)
        ids[random.integers(0, TOKENS, TOKENS // 500)] = 0
        np.save(Path(folder) / "ids.npy", ids)
        for length, rows in SHAPES:
            data = open_data(_config(Path(folder), length, rows))
            batches = READ // (length * rows)
            seconds = [_plain(ids, length, rows, batches), _batches(data, batches), _ahead(data, batches)]
            rates = [batches * length * rows / taken / 1e6 for taken in seconds]
            print(
                f"{rows:4} x {length:<8}{rates[0]:7.1f}{rates[1]:9.1f}{rates[2]:7.1f}{seconds[1] / batches * 1e6:12.0f}",
                flush=True,
            )


def _config(folder: Path, length: int, rows: int) -> Config:
    source = DataSource(kind="tokens", path=str(folder / "ids.npy"), separator=0)
    data = DataConfig(sources=(source,), tokenizer="none", sequence_length=length, cache_dir=str(folder / "cache"))
    return Config(model=ModelConfig(vocab_size=50_000), data=data, train=TrainConfig(global_batch_size=rows))


def _plain(ids: np.ndarray, length: int, rows: int, batches: int) -> float:
    """Return the seconds that a gather of random windows takes."""
    starts = np.random.default_rng(1).integers(0, len(ids) - length - 1, (batches, rows))
    began = time.perf_counter()
    for batch in starts:
        windows = np.empty((rows, length + 1), np.int32)
        for row, start in enumerate(batch):
            windows[row] = ids[start : start + length + 1]
    return time.perf_counter() - began


def _batches(data: Data, batches: int) -> float:
    began = time.perf_counter()
    for step in range(batches):
        data.train_batch(step, slice(None))
    return time.perf_counter() - began


def _ahead(data: Data, batches: int) -> float:
    with data.train_batches(0, slice(None)) as made:
        began = time.perf_counter()
        for _ in range(batches):
            next(made)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
