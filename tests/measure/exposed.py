"""Where the step compiled for H100s waits for transfers, by link, kind and place; and which waits bandwidth forbids to hide.

JAX_PLATFORMS=cpu .venv/bin/python -m tests.measure.exposed --config=configs/7b.py --mesh.fsdp=64
"""

from __future__ import annotations

import sys
from collections import defaultdict

from jaxtrain.command.parsing import parse_config
from jaxtrain.hardware import find_chip
from jaxtrain.planner import deviceless
from jaxtrain.program.collectives import Transfer, read_collectives
from jaxtrain.program.groups import layout_of
from jaxtrain.program.hlo import matmul_flops


def place_of(transfer: Transfer) -> str:
    """Return the part of the step that a transfer belongs to, by the model line that it comes from."""
    source = transfer.source
    if "embed" in source or "(loss)" in source or "/loss" in source:
        return "table, head and loss"
    if "shard_map" not in source and "checkpoint" not in source:
        return "scalars, optimizer"
    if "pipe" in transfer.group.axes:
        return "between stages"
    kind = "backward, again" if "rematted" in source else "backward" if "transpose" in source else "forward"
    return f"{kind}, " + ("first or last layers" if transfer.calls <= 1 else "layers")


def main() -> None:
    """Print a row for each link, kind and place, and the bounds."""
    config, chip = parse_config(sys.argv[1:]), find_chip("h100-sxm")
    program, mesh, _ = deviceless.compile_for(config)
    text = program.as_text()
    moved = read_collectives(text, layout_of(mesh), chip)
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
    for each in moved:
        row = sums["NIC" if each.group.crosses_hosts else "link", each.kind, place_of(each)]
        waited = each.seconds - each.hidden_seconds
        for i, more in enumerate((each.wire / 2**30, (each.wire - each.hidden) / 2**30, each.seconds, waited)):
            row[i] += more
    wire, exposed, *_ = map(sum, zip(*sums.values(), strict=True))
    print(f"{'':55}GiB on the wire   exposed   s on the wire   s waited")
    for key, row in sorted(sums.items(), key=lambda item: -item[1][1]):
        if row[1] > 0.001 * wire:
            print(f"{key[0]:5}{key[1]:20}{key[2]:30}{row[0]:14.2f}{row[1]:11.2f}{row[2]:15.4f}{row[3]:11.4f}")
    compute = matmul_flops(text) / (chip.peak("bfloat16") or float("nan"))
    print(f"{exposed / wire:.1%} of {wire:.1f} GiB exposed; {compute:.3f} s of matmuls")
    for name in ("NIC", "link"):
        rows = [row for key, row in sums.items() if key[0] == name]
        busy, sent = sum(row[2] for row in rows), sum(row[0] for row in rows)
        forbids = max(0.0, busy - compute) / busy * sent / wire if busy else 0.0
        print(f"{name}: {busy:.3f} s on the wire, {busy / compute:.0%} of the matmuls' time; bandwidth forbids {forbids:.1%}")


if __name__ == "__main__":
    main()
