"""`jaxtrain bench --config=configs/125m.py`: measure the compiled train step; print a small table and one JSON line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jaxtrain.command import NoFlags, Usage, parse
from jaxtrain.config.rules import validate
from jaxtrain.errors import EXIT_DONE
from jaxtrain.text import tell

USAGE = Usage(
    "bench",
    "Measure the compiled train step of a config on the devices at hand, on synthetic data: compile time, step time, TFLOP/s, "
    "MFU, memory, and what the loop adds to the bare step.",
    NoFlags,
)


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, print; return the exit code."""
    config = parse(USAGE, arguments).config

    from jaxtrain.measure.bench import Bench, bench_config, table
    from jaxtrain.mesh import count_devices
    from jaxtrain.planner.memory_check import ask_for_memory

    # Without the compilation cache, so that compile_seconds is that of a first run.
    config = validate(bench_config(config), count_devices())
    ask_for_memory(config, 1, tell)
    report = Bench(config).report()
    print(table(report))
    print(json.dumps(report))
    return EXIT_DONE
