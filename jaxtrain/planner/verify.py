"""Compile the best layouts of a search, and replace their estimates by the programs' figures.

For NVIDIA GPUs that XLA can compile for (`targets`) it is the program that they would run: memory, FLOPs and every transfer,
with its overlap with compute. Elsewhere, or without the plugin, the step is compiled for as many fake CPU devices: only that
program's state bytes and FLOPs hold on another device, and the estimate is labelled approximate.

Every layout is compiled in a process of its own, two at a time. An error there becomes one line.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import Chip
from jaxtrain.parallel.pipeline_counts import count_passes
from jaxtrain.planner.candidate import stand_in
from jaxtrain.planner.cost import joules
from jaxtrain.planner.deviceless import CompiledStep, CompilerDied, find_obstacle, has_plugin, report_in_subprocess
from jaxtrain.planner.estimates import Estimate, Memory, Wire
from jaxtrain.planner.formulas import step_flops
from jaxtrain.planner.roofline import roofline
from jaxtrain.planner.search import Objective
from jaxtrain.planner.targets import TARGETS
from jaxtrain.planner.traffic import Flow, Placement, place, seconds
from jaxtrain.planner.wording import layout_words
from jaxtrain.program.collectives import CollectiveRow
from jaxtrain.text import tell

BEST = 5
"""Default number of layouts to compile."""
AT_ONCE = 2
"""Number of compilations at a time."""
MOST_FAKE_DEVICES = 512
"""Making more takes XLA:CPU longer than compiling for them."""


def verify(
    estimates: Sequence[Estimate],
    k: int = BEST,
    objective: Objective = "time",
    tell: Callable[[str], None] = tell,
) -> list[Estimate]:
    """Return the estimates, the first k of them compiled and ranked anew; the others follow unchanged.

    `tell` gets a line for each, since one takes up to minutes. A layout that does not compile is left out, and that line says
    why. One that turns out not to fit comes last. If the compiler's process dies for every layout, the compiler is at fault:
    the estimates stand, and one line says so.

    Args:
      estimates: best first, as `search` ranks them.
      k: how many to compile.
    """

    def check(estimate: Estimate) -> Estimate | ExplainedError:
        started = time.monotonic()
        try:
            result = compiled(estimate)
        except ExplainedError as error:
            return error
        tell(f"verify     {layout_words(estimate)}: compiled in {time.monotonic() - started:.0f} s")
        return result

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(check, estimates[:k]))
    if results and all(isinstance(result, CompilerDied) for result in results):
        tell(f"verify     nothing could be compiled, so that all figures are estimates: {results[0]}")
        return list(estimates)
    for estimate, result in zip(estimates, results, strict=False):
        if isinstance(result, ExplainedError):
            tell(f"verify     {layout_words(estimate)}: left out: {result}")
    found = [result for result in results if isinstance(result, Estimate)]
    found.sort(key=lambda estimate: (not estimate.fits, estimate.score(objective)))
    fitting = [estimate for estimate in found if estimate.fits]
    return [*fitting, *estimates[k:], *found[len(fitting) :]]


def choose_count(chip: Chip, asked: int | None) -> tuple[int, str]:
    """Return how many of the best to compile, and a description of what is then estimated and compiled.

    Args:
      asked: the requested number. Without a compiler for the chip nothing is compiled by default: a program for
        fake CPU devices takes as long to compile, and confirms only the state's bytes and the FLOPs.
    """
    obstacle = find_obstacle() if chip.target in TARGETS else f"XLA has no target for {chip.name} without the device"
    count = (0 if obstacle else BEST) if asked is None else asked
    if not count:
        return 0, "all figures are estimates in closed form" + (f": {obstacle}" if obstacle and asked is None else "")
    where = f"fake CPU devices, labelled approximate: {obstacle}" if obstacle else f"{chip.target}"
    return count, f"figures are estimates in closed form; those of the best {count} come from compiling for {where}"


def compiled(estimate: Estimate) -> Estimate:
    """Return one estimate with its compiled program's figures.

    Raises:
      ExplainedError: it does not compile; in one line.
    """
    chip = estimate.cluster.chip
    if chip.target in TARGETS and has_plugin():
        report = report_in_subprocess(estimate.config, chip.target, estimate.cluster.devices_per_host)
        return with_report(estimate, report)
    return _with_fake(estimate)


def with_report(estimate: Estimate, report: CompiledStep) -> Estimate:
    """Return the estimate with a compiled program's memory, FLOPs and transfers.

    Matmul time is scaled by the program's FLOPs / the formula's. Waiting time: links inside a host and NICs run at the same
    time, so the longer of the two sums of exposed bytes; in a pipeline, for the ticks in which the device works.
    """
    time, config = estimate.time, estimate.config
    placement = place(config.mesh.shape, estimate.cluster.devices_per_host)
    wires = tuple(_wire(row, estimate, placement) for row in report.rows)
    passes = count_passes(config.pipeline.schedule, config.mesh.pipe, config.pipeline.chunks, config.train.microbatches)
    working = config.pipeline.chunks * config.train.microbatches / passes.forward
    sums = [sum(wire.exposed_seconds for wire in wires if wire.crosses_hosts == crosses) for crosses in (False, True)]
    taken = roofline(estimate.cluster.chip, config.model.dtype).taken
    slowed = taken * (sum(wire.seconds for wire in wires) - sum(sums))
    more = report.flops / step_flops(stand_in(config), "cudnn")
    time = dataclasses.replace(time, matmul=time.matmul * more, exposed=(max(sums) + slowed) * working)
    compiled = dataclasses.replace(
        estimate, origin="compiled", memory=_memory(estimate.memory, report), wires=wires, flops=report.flops, time=time
    )
    return dataclasses.replace(compiled, joules=joules(time, compiled.cluster))


def _memory(estimated: Memory, report: CompiledStep) -> Memory:
    """Return the program's bytes by category: arguments are the state; temporaries are divided in the estimate's
    proportions.
    """
    state = estimated.parameters + estimated.optimizer
    rest = estimated.of_program - state
    given, made = report.argument_bytes, report.memory_bytes - report.argument_bytes
    of_state, of_rest = given / state, made / rest if rest else 1.0
    names = {"parameters": of_state, "optimizer": of_state, "other_models": 1.0, "kernels": 1.0, "rollouts": 1.0}
    return Memory(
        **{field.name: getattr(estimated, field.name) * names.get(field.name, of_rest) for field in dataclasses.fields(Memory)}
    )


def _wire(row: CollectiveRow, estimate: Estimate, placement: Placement) -> Wire:
    """Return a row of the compiled program with the time of its transfers."""
    flow = Flow(row.axes, row.kind, row.dtype, row.calls, row.payload)
    spent = seconds(flow, placement, estimate.cluster.chip).total
    exposed = spent * (row.exposed / row.wire if row.wire else 0.0)
    return Wire(row.axes, row.kind, row.dtype, row.wire, spent, exposed, crosses_hosts=row.crosses_hosts)


# ---------------------------------------------------------------------------------------------------------------------
# Without a compiler for the chip: fake CPU devices


def _with_fake(estimate: Estimate) -> Estimate:
    """Return the estimate, labelled approximate, with the state's bytes and FLOPs of the step compiled for as many CPU
    devices.
    """
    devices, memory = estimate.cluster.devices, estimate.memory
    if devices > MOST_FAKE_DEVICES:
        raise ExplainedError(f"{devices} fake CPU devices are too many to compile for (at most {MOST_FAKE_DEVICES})")
    report = report_in_subprocess(estimate.config, "", devices)
    scale = report.argument_bytes / (memory.parameters + memory.optimizer)
    memory = dataclasses.replace(memory, parameters=memory.parameters * scale, optimizer=memory.optimizer * scale)
    return dataclasses.replace(estimate, origin="approximate", memory=memory, flops=report.flops)
