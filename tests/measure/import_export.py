"""Peak resident memory and seconds of import, export and load of a folder of 3 GB: `python -m tests.measure.import_export`.

    .venv/bin/python -m tests.measure.import_export [--kind=llama | embedding] [--gigabytes=3]

Makes a Llama-like folder in bfloat16, in shards of 512 MB, with random weights of width 2048 (embedding: half of it is in one
table), and runs on it in processes of their own `jaxtrain import`, `jaxtrain export` and `jaxtrain.load`, as
`--init_from` reads it. The bound is two largest tensors + 1 GB, for a load beside the parameters. Needs four times the size
on the disk of TMPDIR; all is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 512 << 20
WIDTH, HEADS, KV_HEADS, MLP = 2048, 16, 4, 8192


def shapes_of(kind: str, gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a folder of about this size."""
    vocab = 32_000 if kind == "llama" else int(gigabytes * 2**30 / 2 / 2 / WIDTH)
    kv = WIDTH // HEADS * KV_HEADS
    layer = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH)}
    layer |= {"self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH)}
    layer |= {"mlp.down_proj": (WIDTH, MLP), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    of_layer = sum(2 * int(np.prod(shape)) for shape in layer.values())
    layers = max(1, round((gigabytes * 2**30 - 2 * vocab * WIDTH) / of_layer))
    shapes = {"model.embed_tokens.weight": (vocab, WIDTH), "model.norm.weight": (WIDTH,)}
    return shapes | {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}


def make(folder: Path, kind: str, gigabytes: float) -> tuple[int, int]:
    """Write the folder, a shard at a time; return the bytes of all tensors and of the largest."""
    shapes, random = shapes_of(kind, gigabytes), np.random.default_rng(0)
    config = {"model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config |= {"intermediate_size": MLP, "vocab_size": shapes["model.embed_tokens.weight"][0], "dtype": "bfloat16"}
    config |= {"num_hidden_layers": sum("q_proj" in name for name in shapes), "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}))
    held, files, number = {}, {}, 0
    for name, shape in shapes.items():
        tensor = random.integers(0x3C00, 0x3F00, shape, np.uint16).view(ml_dtypes.bfloat16)
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD_BYTES:
            save_file(held, folder / f"model-{number}.safetensors")
            held, number = {}, number + 1
        held[name], files[name] = tensor, f"model-{number}.safetensors"
    save_file(held, folder / f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sizes = [2 * int(np.prod(shape)) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def run(*arguments: str) -> tuple[float, int]:
    """Run Python; return its seconds and its peak resident bytes."""
    begun = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"python {' '.join(arguments)}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024


def disk_rate(folder: Path) -> float:
    """Return the bytes/s at which a file of 1 GiB is written and synced, as by `dd bs=64M count=16 conv=fsync`."""
    begun, piece, file = time.perf_counter(), bytes(64 << 20), folder / "rate"
    with file.open("wb", buffering=0) as opened:
        for _ in range(16):
            opened.write(piece)
        os.fsync(opened.fileno())
    file.unlink()
    return (1 << 30) / (time.perf_counter() - begun)


def measure(folder: Path, kind: str, gigabytes: float) -> None:
    """Measure and print one kind of folder."""
    source, imported, exported = (str(folder / name) for name in ("source", "run", "exported"))
    # In a process of its own: a child's peak is counted from that of its parent.
    run("-m", "tests.measure.import_export", "--make", source, f"--kind={kind}", f"--gigabytes={gigabytes}")
    size, largest = json.loads((folder / "sizes").read_text())
    limit = 2 * largest + 10**9
    print(f"{kind}: {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, bound {limit / 1e9:.2f} GB", flush=True)
    load = f"import jaxtrain; jaxtrain.load({source!r}, dtype='bfloat16')"
    verbs = {
        "import": ("-m", "jaxtrain", "import", source, f"--run_dir={imported}"),
        "export": ("-m", "jaxtrain", "export", imported, exported),
        "load": ("-c", load),
        "nothing": ("-c", "import jaxtrain, jax; jax.devices()"),
    }
    for name, arguments in verbs.items():
        rate = disk_rate(folder)
        seconds, peak = run(*arguments)
        beside = f", {(peak - 2 * size) / 1e9:.2f} GB beside the parameters in float32" if name == "load" else ""
        print(
            f"  {name:8} {seconds:6.1f} s, peak {peak / 1e9:.2f} GB{beside}; the disk wrote {rate / 1e6:.0f} MB/s before",
            flush=True,
        )


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("llama", "embedding"), action="append")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--make")
    asked = parser.parse_args()
    if asked.make:
        sizes = make(Path(asked.make), asked.kind[0], asked.gigabytes)
        (Path(asked.make).parent / "sizes").write_text(json.dumps(sizes))
        return
    for kind in asked.kind or ("llama", "embedding"):
        folder = Path(tempfile.mkdtemp())
        try:
            measure(folder, kind, asked.gigabytes)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
