"""Measure the devices at hand: matmuls, copies, attention, collectives, power. `measure.calibration` makes a chip of them.

Each operation is warmed up, repeated, and given as a median with its spread; sizes double until time or memory is used up.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.hardware import CollectiveRate
from jaxtrain.ops.attention import attention, choose_backend
from jaxtrain.processes import from_first
from jaxtrain.program.collectives import wire_factor
from jaxtrain.telemetry.energy import open_meter

DTYPES = ("bfloat16", "float32")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
REPETITIONS = 7
CHAINED = 8
"""Operations per program, each on the result of the one before, so that only an eighth of the dispatch time counts."""
FIRST_MATMUL, LARGEST_MATMUL = 256, 16384
FIRST_COPY, LARGEST_COPY = 2**22, 2**30
FIRST_LENGTH, LARGEST_LENGTH = 512, 16384
HEADS, HEAD_DIM = 16, 128
SMALL, FIRST_MESSAGE, LARGEST_MESSAGE = 2**10, 2**16, 2**28
"""Bytes on a device before a collective: a small message shows latency; for bandwidth, sizes grow eightfold."""
IDLE_SECONDS = 2.0
Array = Any


@dataclass(frozen=True)
class Sample:
    """Seconds of one operation, and their spread."""

    seconds: float
    """Median of the repetitions."""
    spread: float
    """(slowest - fastest) / median."""


class Stopwatch:
    """Times compiled programs on the devices; every process of a run makes the same calls.

    Args:
      seconds: approximate limit for all repetitions of one operation.
    """

    def __init__(self, seconds: float):

        self.seconds = seconds
        # Fake devices share one thread pool: concurrent programs take threads from each other and deadlock.
        self._waits = jax.local_devices()[0].platform == "cpu"

    def __call__(self, program: Callable[..., Array], *arguments: Array, chained: int = CHAINED) -> Sample:
        """Time one of the `chained` operations in `program`: warmed up, then REPETITIONS times, several calls in a row each."""

        self._once(program, *arguments)  # compiles
        calls = from_first(max(1, int(self.seconds / REPETITIONS / self._once(program, *arguments))))
        runs, result = [], None
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            for _ in range(calls):
                result = program(*arguments)
                if self._waits:
                    jax.block_until_ready(result)
            jax.block_until_ready(result)
            runs.append((time.perf_counter() - started) / calls / chained)
        median = statistics.median(runs)
        return Sample(median, (max(runs) - min(runs)) / median)

    def goes_on(self, sample: Sample, needs: int, chained: int = CHAINED) -> bool:
        """Return whether there is time for a larger operation, and memory: `needs` bytes must fit a quarter of the device's."""
        quick = sample.seconds * chained * REPETITIONS < self.seconds / 2
        return bool(from_first(quick and needs < memory_bytes() // 4))

    def _once(self, program: Callable[..., Array], *arguments: Array) -> float:

        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - started


def chain(operation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """x -> operation(operation(... x)), CHAINED times, in one program; unrolled, since a loop copies its carry."""

    def chained(x: Array) -> Array:
        for _ in range(CHAINED):
            x = operation(x)
        return x

    return chained


def random_normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Array:
    """Return random numbers as in a model: zeros would draw less power, and so run at a higher clock."""
    return scale * jax.random.normal(jax.random.key(0), shape, dtype)


def measure_matmul(watch: Stopwatch, dtype: str, largest: int = LARGEST_MATMUL) -> list[tuple[int, Sample]]:
    """(edge, sample) of [edge, edge] x [edge, edge] in `dtype`, edges doubling as long as time and memory allow."""
    found: list[tuple[int, Sample]] = []
    edge, goes_on = min(FIRST_MATMUL, largest), True
    while edge <= largest and goes_on:
        x, w = random_normal((edge, edge), dtype), random_normal((edge, edge), dtype, edge**-0.5)
        program = jax.jit(lambda x, w: chain(lambda x: x @ w)(x))
        found.append((edge, watch(program, x, w)))
        edge *= 2
        goes_on = watch.goes_on(found[-1][1], 3 * 4 * edge**2)
    return found


def measure_copy(watch: Stopwatch, largest: int = LARGEST_COPY) -> tuple[int, Sample]:
    """(bytes read and written, sample) of x + 1 over an array that no cache holds, as large as time and memory allow."""
    size = min(FIRST_COPY, largest)
    program = jax.jit(lambda x: x + 1.0)  # not chained: XLA would fuse several into one pass
    while True:
        sample = watch(program, random_normal((size // 4,), "float32"), chained=1)
        if size >= largest or not watch.goes_on(sample, 4 * size, chained=1):
            return 2 * size, sample
        size *= 2


def measure_attention(watch: Stopwatch, largest: int = LARGEST_LENGTH) -> list[tuple[int, str, Sample]]:
    """(length, backend, sample) of causal attention forward and backward in bfloat16, lengths doubling as time allows."""
    device = jax.local_devices()[0]
    capability = float(getattr(device, "compute_capability", 8.0) or 8.0)
    found: list[tuple[int, str, Sample]] = []
    length, goes_on = min(FIRST_LENGTH, largest), True
    while length <= largest and goes_on:
        backend, _ = choose_backend(
            "auto",
            platform=device.platform,
            dtype="bfloat16",
            head_dim=HEAD_DIM,
            sequence_length=length,
            masks_documents=False,
            compute_capability=capability,
        )
        q, k, v = (random_normal((1, length, HEADS, HEAD_DIM), "bfloat16") for _ in range(3))
        compute = functools.partial(attention, backend=backend)
        program = jax.jit(jax.grad(lambda q, k, v, f=compute: f(q, k, v).astype("float32").sum(), argnums=(0, 1, 2)))
        found.append((length, backend, watch(program, q, k, v, chained=1)))
        length *= 2
        goes_on = watch.goes_on(found[-1][2], 32 * length * HEADS * HEAD_DIM, chained=1)
    return found


def attention_flops(length: int) -> float:
    """Return 7 L^2 N H: two matmuls forward, five backward (arXiv:2205.14135, appendix B), on half of the square."""
    return 7 * length**2 * HEAD_DIM * HEADS


def collectives(size: int) -> dict[str, Callable[[Array], Array]]:
    """Return the model code's collectives over the axis "group" of `size` devices, on a device's [n] numbers."""
    ring = [(i, (i + 1) % size) for i in range(size)]
    return {
        "all-gather": lambda x: jax.lax.all_gather(x, "group", tiled=True),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "group", tiled=True),
        "all-reduce": lambda x: jax.lax.psum(x, "group"),
        "all-to-all": lambda x: jax.lax.all_to_all(x, "group", 0, 0, tiled=True),
        "collective-permute": lambda x: jax.lax.ppermute(x, "group", ring),
    }


def collective(kind: str, size: int) -> Callable[[Array], Array]:
    """Return the collective as a function from a device's x to an array of x's shape, for `chain`.

    The result is cut or repeated to that shape in a way that XLA cannot optimise away.
    """
    plain = collectives(size)[kind]
    if kind == "all-gather":
        return lambda x: plain(x)[-x.size :]
    if kind == "reduce-scatter":
        return lambda x: jnp.tile(plain(x) / size, size)
    return (lambda x: plain(x) / size) if kind == "all-reduce" else plain


def groups_of(devices: Sequence[Any], size: int, over: str) -> Any:
    """Return a mesh ("other", "group") of all devices: `size` neighbours in a host (link), or one per host (nic)."""

    table = np.array(devices).reshape(size, -1).T if over == "nic" else np.array(devices).reshape(-1, size)
    return Mesh(table, ("other", "group"), axis_types=(AxisType.Auto,) * 2)


def measure_collective(watch: Stopwatch, mesh: Any, over: str, kind: str, largest: int = LARGEST_MESSAGE) -> CollectiveRate:
    """Return the latency and bandwidth of one collective, with all groups active at once, as in training.

    bandwidth = bytes that a device sends / (time of the largest message - time of the smallest).
    """
    size = mesh.shape["group"]
    spec = PartitionSpec(("other", "group"))
    operation = jax.shard_map(chain(collective(kind, size)), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = jax.jit(operation)

    def take(held: int) -> Sample:
        numbers = max(held // 4 // size, 1) * size  # per device, in equal parts for each device of the group
        ones = jax.jit(lambda: jnp.ones(numbers * mesh.size), out_shardings=NamedSharding(mesh, spec))()
        return watch(program, ones)

    small = take(SMALL)
    held, sample = min(FIRST_MESSAGE, largest), take(min(FIRST_MESSAGE, largest))
    while held < largest and watch.goes_on(sample, 16 * size * held):
        held = min(8 * held, largest)
        sample = take(held)
    payload = held * size if kind == "all-gather" else held
    seconds = max(sample.seconds - small.seconds, sample.seconds / 2)  # the difference may be noise if the message is small
    return CollectiveRate(
        over="nic" if over == "nic" else "link",
        kind=kind,
        devices=size,
        bandwidth=wire_factor(kind, size) * payload / seconds,
        latency=small.seconds,
        spread=max(small.spread, sample.spread),
    )


def measure_collectives(watch: Stopwatch, largest: int = LARGEST_MESSAGE, kinds: Sequence[str] = KINDS) -> list[CollectiveRate]:
    """Measure every kind: over groups of 2, 4, 8, ... and all devices of a host, then over one device of each host."""
    devices, local, processes = jax.devices(), jax.local_device_count(), jax.process_count()
    sizes = [size for size in (2, 4, 8, 16, 32, 64) if size < local and local % size == 0] + ([local] if local > 1 else [])
    meshes = [("link", groups_of(devices, size, "link")) for size in sizes]
    meshes += [("nic", groups_of(devices, processes, "nic"))] if processes > 1 else []
    return [measure_collective(watch, mesh, over, kind, largest) for over, mesh in meshes for kind in kinds]


def latencies(rates: Sequence[CollectiveRate], over: str) -> tuple[float, float] | None:
    """(seconds to begin, seconds per step) of rings: least squares of latency = begin + step (devices - 1), neither below 0.

    From all-gathers and reduce-scatters. If all groups have one size, all latency counts as steps. None without measurements.
    """
    points = [(r.devices - 1, r.latency) for r in rates if r.over == over and r.kind in ("all-gather", "reduce-scatter")]
    if not points:
        return None
    steps, seconds = [p[0] for p in points], [p[1] for p in points]
    if len(set(steps)) > 1:
        slope, begin = statistics.linear_regression(steps, seconds)
        if slope >= 0 and begin >= 0:
            return begin, slope
    return 0.0, statistics.mean(t / n for n, t in points)


def bandwidth_of(rates: Sequence[CollectiveRate], over: str) -> float | None:
    """Return the bytes/s of FSDP's traffic: the mean of all-gather and reduce-scatter over the largest group, or None."""
    of = [r for r in rates if r.over == over and r.kind in ("all-gather", "reduce-scatter")]
    largest = max((r.devices for r in of), default=0)
    return statistics.mean(r.bandwidth for r in of if r.devices == largest) if of else None


@dataclass(frozen=True)
class Findings:
    """All measurements, in seconds, bytes and watts."""

    matmul: dict[str, list[tuple[int, Sample]]]
    copy: tuple[int, Sample]
    attention: list[tuple[int, str, Sample]]
    collectives: list[CollectiveRate]
    watts: tuple[float, float] | None = None
    """Watts of one device: (idle, at work)."""


def measure_all(watch: Stopwatch, say: Callable[[str], None]) -> Findings:
    """Measure everything in sequence; `say` is called with the name of the current measurement."""
    matmul = {}
    for dtype in DTYPES:
        say(f"matmuls in {dtype}")
        matmul[dtype] = measure_matmul(watch, dtype)
    say("copies")
    copy = measure_copy(watch)
    say("attention")
    attention = measure_attention(watch)
    say("collectives")
    collectives = measure_collectives(watch)
    say("power")
    return Findings(matmul, copy, attention, collectives, measure_watts(matmul["bfloat16"][-1][0]))


def measure_watts(edge: int) -> tuple[float, float] | None:
    """Return the watts of this process's first device (idle, in bfloat16 matmuls of that edge); None without a meter."""
    device = jax.local_devices()[0]
    meter, _ = open_meter("auto", device.platform, [device.local_hardware_id or 0])
    if meter is None or is_simulated():
        return None
    x, w = random_normal((edge, edge), "bfloat16"), random_normal((edge, edge), "bfloat16", edge**-0.5)
    program = jax.jit(lambda x, w: chain(lambda x: x @ w)(x))
    jax.block_until_ready(program(x, w))

    def mean_watts(work: Callable[[], object]) -> float:
        before, started = meter.joules(), time.perf_counter()
        while time.perf_counter() - started < IDLE_SECONDS:
            work()
        return (meter.joules() - before) / (time.perf_counter() - started)

    busy = mean_watts(lambda: jax.block_until_ready(program(x, w)))
    time.sleep(IDLE_SECONDS)  # power is a mean over the last second on many GPUs
    return mean_watts(lambda: time.sleep(0.1)), busy


def is_simulated() -> bool:
    """Return whether the devices are several made of one CPU by XLA's flag; they share its cores."""
    return jax.local_devices()[0].platform == "cpu" and jax.local_device_count() > 1


def memory_bytes() -> int:
    """Return the memory of one device that jax may use; for a CPU device, its share of the host's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return int(stats.get("bytes_limit", host))
