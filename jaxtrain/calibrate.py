"""`python -m jaxtrain.calibrate --output chip.json`: measures the devices at hand, for the planner to reckon with.

Matmul rates by size and dtype, the bandwidth of a copy, attention, and collectives over groups of devices inside a host and
between hosts: each warmed up, repeated, and given as a median with its spread. The file that it writes is what `--hardware`
takes wherever a chip's name stands: the chip's own figures, and beside them the share of each that was reached.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.calibrate")

import dataclasses
import datetime
import importlib.metadata
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtrain.chip import Calibration, Chip, Rate
from jaxtrain.chip_file import ENDINGS, write_chip
from jaxtrain.errors import EXIT_DONE, ExplainedError, check_output
from jaxtrain.hardware import CHIPS, resolve_chip
from jaxtrain.main import count_devices
from jaxtrain.planner import measure
from jaxtrain.planner.measure import Findings
from jaxtrain.text import open_console


@dataclass(frozen=True)
class CalibrateConfig:
    """What to measure, and where to write it."""

    output: str = "chip.json"
    """File for the result, .json; give it as --hardware to the planner."""
    overwrite: bool = False
    """Let --output replace a file that is there."""
    chip: str = "auto"
    """The chip whose figures the measured ones are shares of, by name or as a chip file; auto asks the device."""
    seconds: float = 0.2
    """The most that the repetitions of one operation may take, about. More of it: larger sizes, and less noise."""
    distributed: bool = False
    """Join the other processes of the job first, as SLURM, Open MPI or Kubernetes names them, to measure between hosts too."""


def as_chip(base: Chip, found: Findings) -> Chip:
    """The chip with what was measured on it, as shares of what it states; where it states nothing, the best that was measured
    takes that place.
    """
    rates = {d: [(e, 2 * e**3 / s.seconds, s.spread) for e, s in samples] for d, samples in found.matmul.items()}
    best = {dtype: max(rate for _, rate, _ in of) for dtype, of in rates.items() if base.matmul_peak(dtype) is None}
    stated = dataclasses.replace(base, peak_flops={**base.peak_flops, **best})
    peaks = {dtype: stated.matmul_peak(dtype) or math.nan for dtype in rates}
    moved, copy = found.copy
    bandwidths = {"memory": moved / copy.seconds} | {
        over: measure.bandwidth_of(found.collectives, over) for over in ("link", "nic")
    }
    places = {"memory": "memory_bandwidth", "link": "link_bandwidth", "nic": "nic_bandwidth"}
    values: dict[str, Any] = {place: getattr(base, place) or bandwidths[what] for what, place in places.items()}
    shares = {what: bandwidths[what] and bandwidths[what] / values[place] for what, place in places.items()}
    begin = [measure.latencies(found.collectives, over) for over in ("link", "nic")]
    for name, fit in zip(("link_latency", "nic_latency"), begin, strict=True):
        if fit is not None:
            values |= {"collective_latency": (begin[0] or fit)[0], name: fit[1]}
    if found.watts is not None:
        values |= {"idle_watts": found.watts[0], "watts": base.watts or found.watts[1]}
    spreads = [spread for of in rates.values() for *_, spread in of] + [copy.spread]
    spreads += [sample.spread for *_, sample in found.attention] + [rate.spread for rate in found.collectives]
    calibration = Calibration(
        matmul=tuple(Rate(dtype, edge, rate / peaks[dtype], s) for dtype, of in rates.items() for edge, rate, s in of),
        attention=tuple(
            Rate("bfloat16", length, measure.attention_flops(length) / sample.seconds / peaks["bfloat16"], sample.spread)
            for length, _, sample in found.attention
        ),
        **shares,
        collectives=tuple(found.collectives),
        noise=statistics.median(spreads),
        **about_here(),
    )
    based_on = base.target if base.target in CHIPS else ""
    return dataclasses.replace(stated, name=f"{base.name}-measured", based_on=based_on, calibration=calibration, **values)


def about_here() -> dict[str, Any]:
    """Which devices, how many, which software, when."""
    import jax

    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "simulated": measure.is_simulated(),
        "software": f"jax {importlib.metadata.version('jax')}, {jax.devices()[0].client.platform_version.splitlines()[0]}",
        "date": datetime.date.today().isoformat(),
    }


def show(chip: Chip) -> None:
    """Prints what was found, with what it is worth."""
    from rich.table import Table

    measured = chip.calibration
    assert measured is not None
    table = Table(title=f"{measured.device_kind}, {measured.devices} devices, {measured.software}")
    for i, head in enumerate(("what", "size", "reached", "of its peak", "spread")):
        table.add_column(head, justify="left" if i == 0 else "right")
    for what, rates in (("matmul", measured.matmul), ("attention", measured.attention)):
        for rate in rates:
            reached = rate.fraction * (chip.matmul_peak(rate.dtype) or math.nan) / 1e12
            row = (
                f"{what} {rate.dtype}",
                f"{rate.size:,}",
                f"{reached:,.3g} TFLOP/s",
                f"{rate.fraction:.1%}",
                f"{rate.spread:.0%}",
            )
            table.add_row(*row)
    table.add_row(
        "copy", "", f"{(measured.memory or 0) * (chip.memory_bandwidth or 0) / 1e9:,.4g} GB/s", f"{measured.memory:.1%}"
    )
    for rate in measured.collectives:
        stated = (chip.link_bandwidth if rate.over == "link" else chip.nic_bandwidth) or math.nan
        where = f"{rate.kind}, {rate.devices} {'devices' if rate.over == 'link' else 'hosts'}"
        reached = f"{rate.bandwidth / 1e9:,.4g} GB/s, {rate.latency * 1e6:,.1f} us"
        table.add_row(where, "", reached, f"{rate.bandwidth / stated:.1%}", f"{rate.spread:.0%}")
    console = open_console(120)
    console.print(table)
    if chip.idle_watts is not None:
        console.print(f"idle {chip.idle_watts:,.0f} W, rated or at work {chip.watts:,.0f} W")
    console.print(f"spread, (slowest - fastest) / median of {measure.REPETITIONS}: {measured.noise:.0%} in the median")
    if measured.simulated:
        console.print("simulated: fake devices share the cores of one CPU, so these figures are no hardware's")


def main(arguments: Sequence[str]) -> int:
    """Measures, writes, prints; returns the exit code."""
    import tyro

    config = tyro.cli(
        CalibrateConfig,
        args=arguments,
        prog="python -m jaxtrain.calibrate",
        description="Measures the devices at hand, and writes a chip file that --hardware takes.",
        use_underscores=True,
    )
    if not config.output.endswith(ENDINGS[0]):
        raise ExplainedError(f"--output={config.output}: a measured chip is written as {ENDINGS[0]}")
    check_output("--output", config.output, config.overwrite)
    if not 0 < config.seconds <= 60:
        raise ExplainedError(f"--seconds={config.seconds}: give the seconds of one operation, above 0 and up to 60")
    import jax

    if config.distributed:
        jax.distributed.initialize()
    count_devices()
    base = resolve_chip(config.chip, jax.devices()[0].device_kind, "--chip")
    if base.memory_bytes is None:
        base = dataclasses.replace(base, memory_bytes=measure.memory_bytes())
    first = jax.process_index() == 0

    def say(words: str) -> None:
        if first:
            print(f"{words} ...", file=sys.stderr, flush=True)

    found = measure.measure_all(measure.Stopwatch(config.seconds), say)
    if first:
        chip = as_chip(base, found)
        write_chip(config.output, chip)
        show(chip)
        print(f"written to {config.output}; use it as --hardware={config.output}")
    return EXIT_DONE
