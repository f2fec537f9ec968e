"""Measure the error of `estimate_memory` on randomly drawn layouts, which it was not fitted to.

    python -m tests.planner.drawn_layouts --count=60 --seed=12

compiles them for H100s, as `reference_layouts` does with its thirty, and prints the same table. A seed gives the same layouts
with every code: what is far from fitting is left out by a rule of thumb, not by its estimate.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.planner.formulas import parameters_held
from tests.planner.reference_layouts import CACHE, GIB, Layout, print_table

DEVICES = {
    "1b": (4, 8, 16, 32),
    "7b": (8, 16, 32, 64),
    "8b": (16, 32, 64, 128),
    "70b": (64, 128, 256, 512),
    "mixtral_8x7b": (32, 64, 128),
    "qwen3_30b_a3b": (32, 64, 128),
    "deepseek_v3": (256, 512, 1024),
}
MIXTURES = ("mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v3")
MOST_TOKENS = 65_536
"""Largest number of tokens of a microbatch on one device."""
KEPT_WIDTHS = {"none": 60, "dots": 20, "named": 8, "full": 2}
"""Approximate bytes that a layer keeps per token / the model's width."""


def draw(seed: int, count: int) -> list[Layout]:
    """Draw `count` different valid layouts."""
    found: dict[str, Layout] = {}
    for layout in _valid(random.Random(seed)):
        found.setdefault(layout.name, layout)
        if len(found) == count:
            break
    return list(found.values())


def _valid(rng: random.Random) -> Iterator[Layout]:
    while True:
        layout = _draw(rng)
        try:
            config = layout.config()
        except ConfigError:
            continue
        if _is_near(config):
            yield layout


def _is_near(config: Config) -> bool:
    """Return whether parameters with adamw's moments, and kept activations, are each at most about 64 GiB per device."""
    mesh, train, model = config.mesh, config.train, config.model
    tokens = train.global_batch_size * config.data.sequence_length / (mesh.batch_shards * mesh.context * train.microbatches)
    in_flight = 2 * mesh.pipe if mesh.pipe > 1 else 1
    kept = KEPT_WIDTHS[train.remat] * tokens * model.embed_dim * model.num_layers * in_flight / (mesh.pipe * mesh.tensor)
    rows = tokens * (mesh.expert if model.moe else 1)
    return 12 * parameters_held(config) <= 64 * GIB and kept <= 64 * GIB and rows <= 2 * MOST_TOKENS


def _draw(rng: random.Random) -> Layout:
    """Draw any layout; it may be invalid."""
    model = rng.choice(tuple(DEVICES))
    devices = rng.choice(DEVICES[model])
    axes = {"pipe": (1, 1, 1, 2, 4), "tensor": (1, 1, 2, 4, 8), "context": (1, 1, 1, 2, 4), "data": (1, 1, 1, 2)}
    axes["expert"] = (1, 2, 4, 8) if model in MIXTURES else (1,)
    sizes = {axis: rng.choice(choices) for axis, choices in axes.items()}
    microbatches = rng.choice((1, 1, 2, 4, 8)) * sizes["pipe"]
    batch_shards = max(1, devices // (sizes["pipe"] * sizes["tensor"] * sizes["context"]))
    length = 2 ** rng.randint(11, 16)
    rows = [n for n in (1, 2, 3, 4, 8) if n * length // sizes["context"] <= MOST_TOKENS]
    changes: dict[str, Any] = {f"mesh.{axis}": n for axis, n in sizes.items() if n > 1 or axis in ("tensor", "expert")}
    changes |= {
        "data.sequence_length": length,
        "train.global_batch_size": rng.choice(rows) * batch_shards * microbatches,
        "train.microbatches": microbatches,
        "train.remat": rng.choice(("none", "dots", "named", "full")),
        "sharding.zero": rng.choice((3, 3, 2, 1)),
    }
    if sizes["pipe"] > 1:
        changes["pipeline.schedule"] = rng.choice(("1f1b", "1f1b", "gpipe", "interleaved"))
        changes["pipeline.chunks"] = 2 if changes["pipeline.schedule"] == "interleaved" else 1
    if sizes["context"] > 1:
        changes["sharding.context_attention"] = rng.choice(("ring", "ulysses"))
    return Layout(model, devices, changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.planner.drawn_layouts", description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--cache", default=CACHE, help="file in which compiled layouts are kept")
    options = parser.parse_args(arguments)
    return print_table(draw(options.seed, options.count), options.cache)


if __name__ == "__main__":
    sys.exit(main())
