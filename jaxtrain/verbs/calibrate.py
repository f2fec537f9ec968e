"""`jaxtrain calibrate --output=chip.json`: measure the devices at hand, for the planner.

`--hardware` takes the written file in place of a chip's name. It holds the chip's stated figures and the measured share of
each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.command import Usage, parse
from jaxtrain.errors import EXIT_DONE, UsageError
from jaxtrain.files import check_output
from jaxtrain.hardware import ENDINGS, Chip, write_chip
from jaxtrain.text import open_console, tell


@dataclass(frozen=True)
class CalibrateFlags:
    """Flags of `jaxtrain calibrate`."""

    output: str = "chip.json"
    """File for the result, .json; give it as --hardware to the planner."""
    overwrite: bool = False
    """Let --output replace an existing file."""
    chip: str = "auto"
    """Chip whose stated figures are the base, by name or as a chip file; auto: the device's own."""
    seconds: float = 0.2
    """Approximate limit in seconds for the repetitions of one operation. More allows larger sizes and gives less noise."""
    distributed: bool = False
    """Join the job's other processes (SLURM, Open MPI, Kubernetes) first, to measure between hosts too."""


USAGE = Usage(
    "calibrate", "Measure the devices at hand, and write a chip file that --hardware takes.", CalibrateFlags, config="none"
)


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, write, print; return the exit code."""
    flags = parse(USAGE, arguments).own
    if not flags.output.endswith(ENDINGS[0]):
        raise UsageError(f"--output={flags.output}: a measured chip is written as {ENDINGS[0]}")
    check_output("--output", flags.output, flags.overwrite)
    if not 0 < flags.seconds <= 60:
        raise UsageError(f"--seconds={flags.seconds}: give the seconds of one operation, above 0 and up to 60")

    import jax

    from jaxtrain.measure.calibration import calibrate
    from jaxtrain.mesh import count_devices

    if flags.distributed:
        jax.distributed.initialize()
    count_devices()
    first = jax.process_index() == 0

    chip = calibrate(flags.chip, flags.seconds, lambda words: tell(f"{words} ...") if first else None)
    if first:
        write_chip(flags.output, chip)
        show(chip)
        print(f"written to {flags.output}; use it as --hardware={flags.output}")
    return EXIT_DONE


def show(chip: Chip) -> None:
    """Print the measurements with their spread."""
    from jaxtrain.measure.operations import REPETITIONS
    from jaxtrain.tables import plain_table, print_table

    measured = chip.calibration
    assert measured is not None
    title = f"{measured.device_kind}, {measured.devices} devices, {measured.software}"
    table = plain_table(title, ["what"], ["size", "reached", "of its peak", "spread"])
    for what, rates in (("matmul", measured.matmul), ("attention", measured.attention)):
        for rate in rates:
            reached = rate.fraction * (chip.matmul_peak(rate.dtype) or math.nan) / 1e12
            figures = f"{reached:,.3g} TFLOP/s", f"{rate.fraction:.1%}", f"{rate.spread:.0%}"
            table.add_row(f"{what} {rate.dtype}", f"{rate.size:,}", *figures)
    copied = (measured.memory or 0) * (chip.memory_bandwidth or 0) / 1e9
    table.add_row("copy", "", f"{copied:,.4g} GB/s", f"{measured.memory:.1%}")
    for rate in measured.collectives:
        stated = (chip.link_bandwidth if rate.over == "link" else chip.nic_bandwidth) or math.nan
        where = f"{rate.kind}, {rate.devices} {'devices' if rate.over == 'link' else 'hosts'}"
        reached = f"{rate.bandwidth / 1e9:,.4g} GB/s, {rate.latency * 1e6:,.1f} us"
        table.add_row(where, "", reached, f"{rate.bandwidth / stated:.1%}", f"{rate.spread:.0%}")
    console = open_console(120)
    print_table(console, table)
    if chip.idle_watts is not None:
        console.print(f"idle {chip.idle_watts:,.0f} W, rated or at work {chip.watts:,.0f} W")
    console.print(f"spread, (slowest - fastest) / median of {REPETITIONS}: {measured.noise:.0%} in the median")
    if measured.simulated:
        console.print("simulated: fake devices share the cores of one CPU, so these figures are no hardware's")
