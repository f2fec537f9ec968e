"""Measure the devices at hand as a chip for the planner.

Matmul rates by size and dtype, the bandwidth of a copy, attention, and collectives over groups of devices inside a host and
between hosts: each warmed up, repeated, and given as a median with its spread.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.hardware import CHIPS, Calibration, Chip, Rate, resolve_chip
from jaxtrain.measure import operations
from jaxtrain.measure.operations import Findings


def as_chip(base: Chip, found: Findings) -> Chip:
    """Return the chip with measurements as shares of its stated figures; unstated ones become the best measurement."""
    rates = {d: [(e, 2 * e**3 / s.seconds, s.spread) for e, s in samples] for d, samples in found.matmul.items()}
    best = {dtype: max(rate for _, rate, _ in of) for dtype, of in rates.items() if base.matmul_peak(dtype) is None}
    stated = dataclasses.replace(base, peak_flops={**base.peak_flops, **best})
    peaks = {dtype: stated.matmul_peak(dtype) or math.nan for dtype in rates}
    moved, copy = found.copy
    bandwidths = {"memory": moved / copy.seconds} | {
        over: operations.bandwidth_of(found.collectives, over) for over in ("link", "nic")
    }
    places = {"memory": "memory_bandwidth", "link": "link_bandwidth", "nic": "nic_bandwidth"}
    values: dict[str, Any] = {place: getattr(base, place) or bandwidths[what] for what, place in places.items()}
    shares = {what: bandwidths[what] and bandwidths[what] / values[place] for what, place in places.items()}
    begin = [operations.latencies(found.collectives, over) for over in ("link", "nic")]
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
            Rate("bfloat16", length, operations.attention_flops(length) / sample.seconds / peaks["bfloat16"], sample.spread)
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
    """Return which devices, how many, which software, when."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "simulated": operations.is_simulated(),
        "software": f"jax {importlib.metadata.version('jax')}, {jax.devices()[0].client.platform_version.splitlines()[0]}",
        "date": datetime.date.today().isoformat(),
    }


def calibrate(chip: str, seconds: float, say: Callable[[str], None]) -> Chip:
    """Measure all that a chip file holds, together with the other processes of the job.

    Args:
      chip: its stated figures are the base of the measured shares; a name, a chip file, or auto for the device's own kind.
      seconds: approximate limit for the repetitions of one operation.
      say: called with a line for each operation.
    """
    base = resolve_chip(chip, jax.devices()[0].device_kind, "--chip")
    if base.memory_bytes is None:
        base = dataclasses.replace(base, memory_bytes=operations.memory_bytes())
    return as_chip(base, operations.measure_all(operations.Stopwatch(seconds), say))
