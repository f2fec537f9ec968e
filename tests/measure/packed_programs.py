"""What masks of documents cost in the step compiled for H100s: attention's calls, memory, matmul FLOPs, arrays of [L, L].

.venv/bin/python -m tests.measure.packed_programs --config=configs/8b.py --mesh.fsdp=8
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace

from jaxtrain.command.parsing import parse_config
from jaxtrain.config import Config
from jaxtrain.hardware import find_chip
from jaxtrain.planner import deviceless
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.program.collectives import read_collectives
from jaxtrain.program.groups import layout_of
from jaxtrain.program.hlo import matmul_flops


def square_arrays(text: str, length: int) -> int:
    """Return how many instructions make an array of which two dims are `length`."""
    shapes = re.findall(r"= \(?\w+\[([\d,]+)\]", text)
    return sum(shape.split(",").count(str(length)) > 1 for shape in shapes)


def row(config: Config) -> str:
    """Return the figures of the step of one config."""
    program, mesh, attention = deviceless.compile_for(config)
    text, memory, backend = program.as_text(), program.memory_analysis(), attention.split(":")[0]
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    guess = estimate_memory(config, backend)
    calls = Counter(re.findall(r'custom_call_target="__cudnn\$(\w+)"', text))
    moved = read_collectives(text, layout_of(mesh), find_chip("h100-sxm"))
    sent, hidden = sum(each.wire for each in moved), sum(each.hidden for each in moved)
    held = f"{total / 2**30:.2f} GiB (closed form {guess.of_program / 2**30:.2f}, kernels {guess.kernels / 2**30:.2f} more)"
    squares = square_arrays(text, config.data.sequence_length // config.mesh.context)
    return (
        f"{backend}: {held}, {matmul_flops(text):.4e} FLOPs, {sent / 2**30:.2f} GiB sent, {1 - hidden / sent:.1%} exposed, "
        f"{squares} arrays of [L, L], calls {dict(calls)}"
    )


def main() -> None:
    """Print a line for masks off, on, and on by blockwise."""
    config = parse_config(sys.argv[1:])
    kinds = {"off": (False, "auto"), "on": (True, "auto"), "on, blockwise": (True, "blockwise")}
    for kind, (masks, backend) in kinds.items():
        data, model = replace(config.data, mask_documents=masks), replace(config.model, attention=backend)
        print(f"masks {kind}:", row(replace(config, data=data, model=model)), flush=True)


if __name__ == "__main__":
    main()
