"""Check the devices: correct matmuls on each, as fast as on the others, and enough memory."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.host_memory import available_bytes
from jaxtrain.measure.operations import memory_bytes
from jaxtrain.models.building import choose_attention
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.preflight.checks import Check, Finding, Site, odd_ones
from jaxtrain.text import readable_size

EDGE = {"cpu": 128}
"""Edge of the matmul that is compared with numpy's, element by element."""
LARGE_EDGE = {"cpu": 256}
"""Edge of the timed matmul chain, whose last result is compared between devices."""
EDGE_ELSEWHERE, LARGE_EDGE_ELSEWHERE = 1024, 4096
DTYPES = ("bfloat16", "float32")
IN_A_ROW = 8
REPETITIONS = 5
SLOW = {"cpu": 3.0}
"""A device that takes this many times the median is reported; fake devices share cores."""
SLOW_ELSEWHERE = 1.25
FULL = 0.9
"""Share of the memory above which an estimate with 10% error cannot tell whether the run fits."""


def integers(edge: int, seed: int) -> np.ndarray:
    """Return random [edge, edge] of -4 .. 4: their products and sums are exact in bfloat16, TF32 and float32, in any order."""
    return np.random.default_rng(seed).integers(-4, 5, (edge, edge), dtype=np.int8)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def product_chain(a: jax.Array, b: jax.Array) -> jax.Array:
    """x <- (a @ x) mod 8, IN_A_ROW times from x = b; the sum of x_i (2 i + 1) modulo 2^32, exact on any device."""
    x = b
    for _ in range(IN_A_ROW):
        x = (product(a, x).astype(jnp.int32) & 7).astype(a.dtype)
    rows, columns = (lax.broadcasted_iota(jnp.uint32, x.shape, dim) for dim in (0, 1))
    return jnp.sum(x.astype(jnp.uint32) * (2 * (rows * np.uint32(x.shape[1]) + columns) + 1), dtype=jnp.uint32)


def product_on(device: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a @ b as this device computes it."""
    return np.asarray(jax.jit(product)(jax.device_put(a, device), jax.device_put(b, device)))


def wrong_numbers(device: Any, edge: int) -> str:
    """Return how a matmul on this device differs from numpy's; empty if it does not."""
    a, b = integers(edge, 0), integers(edge, 1)
    right = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    for dtype in DTYPES:
        found = product_on(device, a.astype(dtype), b.astype(dtype))
        places = np.argwhere(found != right)
        if len(places):
            i, j = places[0]
            return f"{len(places)} of {right.size} numbers in {dtype}, [{i}, {j}] is {found[i, j]:g} and not {right[i, j]:g}"
    return ""


def timed_chain(device: Any, edge: int) -> tuple[float, list[int]]:
    """(seconds of a matmul in the best repetition, checksum of each repetition)."""
    operands = [jax.device_put(integers(edge, seed).astype("bfloat16"), device) for seed in (2, 3)]
    program = jax.jit(product_chain)
    sums, seconds = [int(program(*operands))], []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        result = jax.block_until_ready(program(*operands))
        seconds.append((time.perf_counter() - started) / IN_A_ROW)
        sums.append(int(result))
    return min(seconds), sums


def look_at_devices(site: Site) -> list[dict[str, Any]]:
    """Return for each device of this process its wrong numbers and its seconds."""
    rows = []
    for device in jax.local_devices():
        small, large = (EDGE.get(device.platform, EDGE_ELSEWHERE), LARGE_EDGE.get(device.platform, LARGE_EDGE_ELSEWHERE))
        seconds, sums = timed_chain(device, large)
        facts = {"device": device.id, "kind": device.device_kind, "platform": device.platform, "edge": large}
        rows.append(facts | {"wrong": wrong_numbers(device, small), "seconds": seconds, "sums": sums})
    return rows


def judge_devices(site: Site, seen: list[list[dict[str, Any]]]) -> list[Finding]:
    """Report devices that compute wrongly, are of another kind, or are slow."""
    rows = [(process, facts) for process, of in enumerate(seen) for facts in of]
    name = lambda process, facts: f"device {facts['device']} of {site.name(process)}"  # noqa: E731
    findings = [
        Finding("matmul", "failed", f"{name(process, facts)} computes wrongly: {words}")
        for process, facts in rows
        if (words := facts["wrong"] or _unlike(facts["sums"], rows, facts["edge"]))
    ]
    kind, others = odd_ones([facts["kind"] for _, facts in rows])
    for i, other in others.items():
        findings.append(Finding("matmul", "warning", f"{name(*rows[i])} is a {other}, most are {kind}"))
    median = statistics.median_low(facts["seconds"] for _, facts in rows)  # of two hosts, compare with the faster
    for process, facts in rows:
        times = facts["seconds"] / median
        if times > SLOW.get(facts["platform"], SLOW_ELSEWHERE):
            words = f"{name(process, facts)} is slow: {1e3 * facts['seconds']:.3g} ms a matmul, {times:.1f} times the median"
            findings.append(Finding("matmul", "warning", words))
    rate = 2 * rows[0][1]["edge"] ** 3 / median / 1e12
    times = sorted(facts["seconds"] / median for _, facts in rows)
    words = f"right on all {len(rows)} devices ({kind}); {rate:.3g} TFLOP/s in bfloat16, from {1 / times[-1]:.0%} of the median"
    values = {"devices": [facts | {"process": process} for process, facts in rows]}
    return findings or [Finding("matmul", "ok", words, values)]


def _unlike(sums: list[int], rows: list[tuple[int, dict[str, Any]]], edge: int) -> str:
    """Return how a device's results differ from one another, or from those of most devices; empty if they do not."""
    if len(set(sums)) > 1:
        return f"{len(sums)} runs of the same {IN_A_ROW} matmuls of edge {edge} came to {len(set(sums))} different results"
    most = Counter(facts["sums"][0] for _, facts in rows).most_common(1)[0][0]
    return "" if sums[0] == most else f"{IN_A_ROW} matmuls of edge {edge} in a row come to {sums[0]:08x}, elsewhere {most:08x}"


def look_at_memory(site: Site) -> dict[str, Any]:
    """Return a device's memory (of a CPU device its share of the host's free memory), and the device count."""
    of_host = jax.local_devices()[0].platform == "cpu"
    free = available_bytes() if of_host else None
    held = memory_bytes() if free is None else free // jax.local_device_count()
    return {"bytes": held, "devices": jax.local_device_count(), "of_host": of_host}


def judge_memory(site: Site, seen: list[dict[str, Any]]) -> list[Finding]:
    """Judge the device with the least memory; CPU devices share the host's."""
    backend, _ = choose_attention(site.config, site.mesh)
    needed = estimate_memory(site.config, backend).total
    held = []
    for process, facts in enumerate(seen):
        sharing = site.hosts.count(site.hosts[process]) if facts["of_host"] else 1
        held.append(facts["bytes"] / sharing)
    least = min(range(len(held)), key=lambda i: held[i])
    words = f"the step takes about {readable_size(needed)} a device, of {readable_size(held[least])} in {site.name(least)}"
    values = {"estimate_bytes": needed, "device_bytes": held}
    if needed > held[least]:
        out = "more mesh.fsdp or mesh.tensor, more train.microbatches, --train.remat=full, or ask `jaxtrain plan`"
        return [Finding("memory", "failed", f"{words}: {out}", values)]
    state = "warning" if needed > FULL * held[least] else "ok"
    return [Finding("memory", state, words + (", which is close" if state == "warning" else ""), values)]


def checks() -> list[Check]:
    """Return the checks of numbers and speed, then of memory."""
    return [Check("matmul", look_at_devices, judge_devices), Check("memory", look_at_memory, judge_memory)]
