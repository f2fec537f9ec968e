"""`jaxtrain layouts --config=mine.py --draws=20`: prove that the layout does not change what a config trains.

Draws valid layouts over all seven mesh axes of fake devices, and compares each with one device. Without --config it draws tiny
models of every kind too. A config that fails is printed as code.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtrain.command import Usage, parse
from jaxtrain.config import MESH_AXES, Config
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, UsageError
from jaxtrain.text import show, tell

if TYPE_CHECKING:
    from jaxtrain.measure.layouts import Errors

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""These flags halve the compile time, which dominates for programs that run for milliseconds."""


@dataclass(frozen=True)
class LayoutsFlags:
    """Flags of `jaxtrain layouts`."""

    draws: int = 20
    """Number of layouts."""
    devices: int = 8
    """Number of fake CPU devices, a power of two."""
    seed: int = 0
    """Seed of the draws."""


USAGE = Usage(
    "layouts",
    "Draw layouts of a config over fake devices, and compare each with one device, in float32: initial parameters bit by bit, "
    "loss and gradients of the first step, losses of three steps. Without --config draw tiny models of every kind too.",
    LayoutsFlags,
    config="taken",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, draw, compare, print; return the exit code, 1 if a layout changes the result."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before a config file imports jax
    line = parse(USAGE, arguments)
    flags = line.own
    if flags.draws < 1:
        raise UsageError(f"--draws={flags.draws}: give at least 1")
    if flags.devices < 2 or flags.devices & (flags.devices - 1):
        raise UsageError(f"--devices={flags.devices}: give a power of two, 2 or more")

    xla_flags = (os.environ.get("XLA_FLAGS", ""), QUICK, f"--xla_force_host_platform_device_count={flags.devices}")
    os.environ |= {"XLA_FLAGS": " ".join(xla_flags).strip()}
    import jax

    from jaxtrain.measure.layouts import as_task, axes_of, compare, random_configs

    found: list[tuple[Config, Errors]] = []
    broken: list[str] = []
    task = as_task(line.config) if line.path else None
    for number, config in enumerate(random_configs(flags.draws, flags.devices, flags.seed, task), 1):
        try:
            found.append((config, compare(config)))
            problem = found[-1][1].problem
        except Exception:
            problem = traceback.format_exc(limit=-3)
        if problem:
            broken.append(f"{problem}\n{config!r}")
        tell(f"{number}/{flags.draws} {axes_of(config)}: {broken[-1] if problem else 'equal'}")
        jax.clear_caches()
    print_table(found)
    show("\n\n".join([f"\n{len(broken)} layouts change the result", *broken]))
    return EXIT_ERROR if broken else EXIT_DONE


def print_table(found: Sequence[tuple[Config, Errors]]) -> None:
    """Print the worst error of the layouts in which each axis is above 1."""
    print("| axis above 1 | draws | same initial bits | loss | worst gradient leaf | 3-step loss curve |")
    print("|---|---|---|---|---|---|")
    for axis in (*MESH_AXES, "any"):
        rows = [errors for config, errors in found if axis == "any" or getattr(config.mesh, axis) > 1]
        if rows:
            same = "yes" if all(errors.same_start for errors in rows) else "NO"
            worst = [max(getattr(errors, name) for errors in rows) for name in ("loss", "gradient", "curve")]
            print(f"| {axis} | {len(rows)} | {same} | {' | '.join(f'{error:.1e}' for error in worst)} |")
