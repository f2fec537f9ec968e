"""What the planner said of fixed layouts, kept in goldens.json, so that a rebuild that changes a figure is seen.

    python -m tests.planner.goldens --write

writes today's figures; `test_goldens.py` compares. Figures are rounded to six digits: memory and its parts, bytes sent by axes,
kind and dtype, seconds of a step by what limits them, FLOPs of a device; and the payload and calls of every closed form.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.hardware import find_chip
from jaxtrain.planner.cost import estimate
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.formulas_collectives import collectives, uncovered
from tests.planner.drawn_layouts import draw
from tests.planner.published import RUNS
from tests.planner.reference_layouts import LAYOUTS, Layout

FILE = Path(__file__).with_suffix(".json")
SEED, DRAWN, DIGITS = 12, 30, 6
OTHERS = (
    Layout("8b", 8, {"mesh.fsdp": 8, "optimizer.name": "muon", "train.global_batch_size": 8}),
    Layout("8b", 16, {"optimizer.name": "adafactor", "train.global_batch_size": 16}),
    Layout("deepseek_v3", 256, {"optimizer.name": "muon", "train.global_batch_size": 1920}),
    Layout("qwen3_30b_a3b", 32, {"mesh.expert": 4, "optimizer.name": "adafactor", "train.global_batch_size": 32}),
    Layout("7b", 16, {"optimizer.name": "sgd", "optimizer.beta1": 0.0, "train.global_batch_size": 32}),
    Layout("7b", 16, {"mesh.tensor": 4, "sharding.take_turns": False, "train.global_batch_size": 16}),
    Layout("7b", 16, {"mesh.replica": 2, "sync.mode": "local", "train.global_batch_size": 32}),
    Layout("7b", 16, {"mesh.context": 4, "sharding.context_attention": "gather", "train.global_batch_size": 16}),
)
"""Optimizers, and settings that neither the reference layouts nor the drawn ones have."""


def figures() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the rounded figures of every layout, and of every published run its predicted tokens/s a GPU."""
    for layout in (*LAYOUTS, *draw(SEED, DRAWN), *OTHERS):
        yield layout.name, figures_of(layout)
    for number, run in enumerate(RUNS):
        yield f"{run.program} {run.model}, run {number}", {"tokens per second": _rounded(run.predicted)}


def figures_of(layout: Layout) -> dict[str, Any]:
    """Return the rounded figures of one layout."""
    config = layout.config()
    found = estimate(config, Cluster(find_chip("h100-sxm"), math.ceil(layout.devices / 8), min(8, layout.devices)))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for entry in () if uncovered(config) else collectives(config):
        total = sums[f"{entry.axes} {entry.kind} {entry.dtype}"]
        total[0], total[1] = total[0] + entry.calls, total[1] + entry.payload
    return {
        "memory": _fields(found.memory),
        "time": _fields(found.time),
        "flops": _rounded(found.flops),
        "model flops": _rounded(found.model_flops),
        "sent": {
            f"{wire.axes} {wire.kind} {wire.dtype}": [_rounded(wire.bytes), _rounded(wire.exposed_seconds)]
            for wire in sorted(found.wires, key=lambda wire: (wire.axes, wire.kind, wire.dtype))
        },
        "calls and payload": {key: [_rounded(value) for value in total] for key, total in sorted(sums.items())},
    }


def _fields(parts: Any) -> dict[str, float]:
    every = dataclasses.asdict(parts) | {"total": parts.total}
    return {
        name: _rounded(value) for name, value in every.items() if name not in ("other_models", "kernels", "rollouts") or value
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")


def flat(figures: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Return nested figures by dotted name."""
    found: dict[str, Any] = {}
    for key, value in figures.items():
        whole = f"{name}.{key}" if name else key
        found |= flat(value, whole) if isinstance(value, dict) else {whole: value}
    return found


def main() -> int:
    """Write the file; an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.planner.goldens", description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    lines = [
        f"{json.dumps(name)}: {{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in of.items()) + "}"
        for name, of in figures()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
