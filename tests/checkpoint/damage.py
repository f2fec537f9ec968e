"""Damages a saved checkpoint at random: flipped bits, truncated, emptied and deleted files."""

from __future__ import annotations

import random
from pathlib import Path


def damage(folder: Path, chance: random.Random) -> str:
    """Damages one file below `folder`; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # By size, as bits rot; but every file gets its chance.
    path = chance.choices(files, [file.stat().st_size + 200 for file in files])[0]
    kind, data = chance.choice(("flip", "flip", "flip", "truncate", "zero", "delete")), bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "zero":
        start = chance.randrange(len(data))
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
        path.write_bytes(data)
    else:
        at = chance.randrange(8 * len(data))
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
    return f"{kind} {path.relative_to(folder)}"
