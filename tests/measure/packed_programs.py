"""What masks of documents cost in the step compiled for H100s: attention's calls, memory, matmul FLOPs, arrays of [L, L].

.venv/bin/python -m tests.measure.packed_programs --config=configs/8b.py --mesh.fsdp=8
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from dataclasses import replace

from jaxtrain.command.parsing import parse_config
from jaxtrain.config import Config
from jaxtrain.planner import deviceless
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.program.hlo import matmul_flops


def square_arrays(text: str, length: int) -> int:
    """Return how many instructions make an array of which two dims are `length`."""
    shapes = re.findall(r"= \(?\w+\[([\d,]+)\]", text)
    return sum(shape.split(",").count(str(length)) > 1 for shape in shapes)


def row(config: Config) -> str:
    """Return the figures of the step of one config."""
    program, _, attention = deviceless.compile_for(config)
    text, memory = program.as_text(), program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    calls = Counter(re.findall(r'custom_call_target="__cudnn\$(\w+)"', text))
    share = config.data.sequence_length // config.mesh.context
    squares = square_arrays(text, share) + square_arrays(text, config.data.sequence_length) * (config.mesh.context > 1)
    guess = estimate_memory(config, attention.split(":")[0]).total
    return (
        f"{attention.split(':')[0]:<11} {total / 2**30:6.2f} GiB (closed form {guess / 2**30:6.2f})  "
        f"{matmul_flops(text):.4e} FLOPs  [L, L] arrays {squares}  calls {dict(calls)}  ({attention})"
    )


def main() -> None:
    """Print a line for masks off, on, and on by blockwise."""
    config = parse_config(sys.argv[1:])
    assert math.prod(config.mesh.shape) > 0
    kinds = {"off": (False, "auto"), "on": (True, "auto"), "on, blockwise": (True, "blockwise")}
    for kind, (masks, backend) in kinds.items():
        data, model = replace(config.data, mask_documents=masks), replace(config.model, attention=backend)
        print(f"masks {kind:<14}", row(replace(config, data=data, model=model)), flush=True)


if __name__ == "__main__":
    main()
