"""Explain why a layout won: against the runner-up and other kinds of layout, what limits it, what would change the answer."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.hardware import Chip
from jaxtrain.planner.answer import Bill
from jaxtrain.planner.estimates import Cluster, Estimate, Memory, SearchResult, StepTime, Wire, axes_in_use
from jaxtrain.planner.wording import (
    MEMORY_WORDS,
    TIME_WORDS,
    cluster_words,
    duration,
    gib,
    layout_words,
    link_words,
    mesh_words,
    percent,
    scaled,
    seconds,
    shape_words,
)
from jaxtrain.text import listed

Search = Callable[[Config, Cluster], SearchResult]
SECONDS_TO_ASK = 20.0
"""Seconds after which no further search is begun, so that the answer for thousands of devices comes in time too."""
NEGLIGIBLE = 0.01
"""Differences below this share count as none."""
SPENT_ON = TIME_WORDS | {
    "memory_bound": "work that the memory's bandwidth limits",
    "optimizer": "the optimizer",
    "exposed": "waiting for transfers",
    "bubble": "waiting for other stages",
    "overhead": "launching kernels",
    "other_models": "forward passes before the step",
}


def explain_plan(
    config: Config, cluster: Cluster, objective: str, found: SearchResult, ranked: Sequence[Estimate], search: Search
) -> tuple[str, ...]:
    """Return the paragraphs of an answer.

    Args:
      ranked: best first, after verification; empty if nothing fits.
      search: searches for another cluster or config, to find what would change the answer.
    """
    if not ranked:
        return (why_nothing_fits(config, cluster, found),)
    best = ranked[0]
    return (
        why_first(ranked, found, objective),
        what_limits(best, found),
        what_would_change(config, cluster, found.ranked[0], search, objective),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Why it won


def why_first(ranked: Sequence[Estimate], found: SearchResult, objective: str = "time") -> str:
    """Compare the winner with the runner-up, and with the best of up to two other kinds of layout."""
    best = ranked[0]
    said = [
        f"{layout_words(best)} is the best of {found.candidates:,} layouts: {seconds(best.time.total)} a step"
        + (f", {percent(best.mfu)} MFU" if best.mfu is not None else "")
        + f", {scaled(best.tokens_per_second)} tokens/s"
        + (f", {best.joules_per_token:.3g} J/token" if objective == "energy" and best.joules_per_token is not None else "")
        + "."
    ]
    others = ranked[1:]
    if others:
        said.append(_against("The runner-up", best, others[0], found, objective))
    kinds: dict[frozenset[str], Estimate] = {}
    for estimate in (*others, *found.ranked, *found.kinds):
        if _kind(estimate) not in (_kind(best), _kind(ranked[min(1, len(others))])):  # the runner-up is described already
            kinds.setdefault(_kind(estimate), estimate)
    nearest = sorted(kinds.values(), key=lambda estimate: estimate.score(objective))[:2]
    said += [_against(f"The best {_apart(best, estimate)}", best, estimate, found, objective) for estimate in nearest]
    return " ".join(said + _checked(ranked, found))


def _checked(ranked: Sequence[Estimate], found: SearchResult) -> list[str]:
    """Return a sentence on verification: how far memory and time were from the estimates."""
    approximate = sum(estimate.origin == "approximate" for estimate in ranked)
    pairs = [(estimate, _estimated(estimate, found)) for estimate in ranked if estimate.origin == "compiled"]
    if not pairs and approximate and not all(estimate.origin == "approximate" for estimate in found.ranked):
        return [
            f"{approximate} were compiled for fake CPU devices, which checks their state and FLOPs but is no GPU's program."
        ]
    pairs = [(estimate, before) for estimate, before in pairs if before]
    if not pairs:
        return []
    off = {
        "memory": max(abs(before.memory.total / estimate.memory.total - 1) for estimate, before in pairs),
        "time": max(abs(before.time.total / estimate.time.total - 1) for estimate, before in pairs),
    }
    were = f"{len(pairs)} of them were" if len(pairs) > 1 else "One of them was"
    large = sum(not estimate.fits for estimate, _ in pairs)
    return [
        f"{were} compiled for the chip: estimates of memory were up to {off['memory']:.0%} off, of time {off['time']:.0%}"
        + (f"; {large} turned out not to fit." if large else ".")
    ]


def _estimated(estimate: Estimate, found: SearchResult) -> Estimate | None:
    """Return the search's own estimate of a layout."""
    return next((other for other in found.ranked if _layout(other.config) == _layout(estimate.config)), None)


def _kind(estimate: Estimate) -> frozenset[str]:
    return axes_in_use(estimate.config.mesh.shape)


def _apart(best: Estimate, other: Estimate) -> str:
    """Return how another kind differs: "without pipe", "with context"."""
    less = [axis for axis in MESH_AXES if axis in _kind(best) - _kind(other)]
    more = [axis for axis in MESH_AXES if axis in _kind(other) - _kind(best)]
    words = ([f"without {listed(less)}"] if less else []) + ([f"with {listed(more)}"] if more else [])
    return " and ".join(words)


def _against(name: str, best: Estimate, other: Estimate, found: SearchResult, objective: str) -> str:
    """Return one comparison; a layout that was not compiled is compared with the winner's estimate."""
    if other.origin != best.origin:
        best = _estimated(best, found) or best
    worse = other.score(objective) / best.score(objective) - 1
    what = "energy" if objective == "energy" else "time"
    measure = f"takes {worse:.1%} more {what}" if worse > 0 else f"was estimated to take {-worse:.1%} less {what}"
    if abs(worse) < NEGLIGIBLE:
        measure = f"is as good within {max(abs(worse), 0.001):.1%}"
    return f"{name}, {layout_words(other)}, {measure}: {_differences(best, other)}."


def _differences(best: Estimate, other: Estimate) -> str:
    """Return the two parts of the step that differ most, the longer first."""
    changes = {name: getattr(other.time, name) - getattr(best.time, name) for name in SPENT_ON}
    floor = 0.002 * best.time.total
    longer = sorted((name for name in changes if changes[name] > floor), key=lambda name: -changes[name])[:2]
    shorter = sorted((name for name in changes if changes[name] < -floor), key=lambda name: changes[name])[:1]
    said = [f"{seconds(changes[name])} more on {SPENT_ON[name]}{_culprit(name, best, other)}" for name in longer]
    said += [f"{seconds(-changes[name])} less on {SPENT_ON[name]}" for name in shorter]
    spare = (other.memory.total - best.memory.total) / best.memory.total
    if not said and abs(spare) > NEGLIGIBLE:
        said = [f"the same time, with {abs(spare):.0%} {'more' if spare > 0 else 'less'} memory"]
    return listed(said) or "the same in every part of the step"


def _culprit(name: str, best: Estimate, other: Estimate) -> str:
    """Return, for waiting, the transfer that makes most of the difference."""
    if name != "exposed":
        return ""
    before = {(wire.axes, wire.kind): 0.0 for wire in other.wires}
    for wire in best.wires:
        before[wire.axes, wire.kind] = before.get((wire.axes, wire.kind), 0.0) + wire.exposed_seconds
    worst = max(other.wires, key=lambda wire: wire.exposed_seconds - before[wire.axes, wire.kind], default=None)
    return (
        f" (mostly {worst.kind} along {worst.axes})" if worst and worst.exposed_seconds > before[worst.axes, worst.kind] else ""
    )


# ---------------------------------------------------------------------------------------------------------------------
# What limits it


def limiting_part(step: StepTime) -> str:
    """Say where most of a step goes."""
    parts = {
        "Compute limits it": step.matmul + step.attention,
        "Transfers limit it": step.exposed,
        "The pipeline's bubble limits it": step.bubble,
        "Memory bandwidth limits it": step.memory_bound + step.optimizer,
        "Launching kernels limits it": step.overhead,
        "Another model limits it": step.other_models,
        "Rollouts limit it": step.rollouts,
    }
    return max(parts, key=lambda name: parts[name])


def what_limits(best: Estimate, found: SearchResult) -> str:
    """Return where the step's time goes, which link is waited for, and how tight memory is."""
    total = best.time.total
    shares = sorted(((getattr(best.time, name) / total, words) for name, words in SPENT_ON.items()), reverse=True)
    spent = listed([f"{share:.1%} {words}" for share, words in shares if share >= 0.001])
    said = [f"{limiting_part(best.time)}: a step is {spent}."]
    waiting = sum(wire.exposed_seconds for wire in best.wires)
    if waiting > NEGLIGIBLE * total:
        worst = max(best.wires, key=_waited(best.wires))
        share = _waited(best.wires)(worst) / waiting
        said.append(f"Of the waiting, {share:.0%} is for {worst.kind} along {worst.axes}, over {link_words(worst)}.")
    budget = best.cluster.budget_bytes
    if math.isfinite(budget):
        largest = _largest(best.memory)
        said.append(
            f"The fullest device uses {gib(best.memory.total)} of {gib(budget)} GiB, most of it for {largest}"
            + _faster_without_limit(best, found)
        )
    return " ".join(said)


def _waited(wires: Sequence[Wire]) -> Callable[[Wire], float]:
    """Return a function: the seconds waited for all transfers of a wire's axes, kind and link."""
    return lambda wire: sum(
        other.exposed_seconds
        for other in wires
        if (other.axes, other.kind, other.crosses_hosts) == (wire.axes, wire.kind, wire.crosses_hosts)
    )


def _largest(memory: Memory) -> str:
    name = max(MEMORY_WORDS, key=lambda name: getattr(memory, name))
    words = "the optimizer's state" if name == "optimizer" else MEMORY_WORDS[name]
    return f"{words} ({gib(getattr(memory, name))} GiB)"


def _faster_without_limit(best: Estimate, found: SearchResult) -> str:
    """Return the end of the sentence on memory: whether a layout that does not fit would be faster."""
    faster = [point for point in found.points if not point.fits and point.seconds < best.time.total * (1 - NEGLIGIBLE)]
    if not faster:
        return "; memory does not limit it: no layout that needs more is faster."
    point = min(faster, key=lambda point: point.seconds)
    needs = f"would take {seconds(point.seconds)}, but needs {gib(point.bytes)} GiB"
    mesh = "this mesh with other choices" if point.mesh == best.config.mesh.shape else shape_words(point.mesh)
    return f"; memory limits it too: {mesh} {needs}."


# ---------------------------------------------------------------------------------------------------------------------
# What would change it


def what_would_change(config: Config, cluster: Cluster, best: Estimate, search: Search, objective: str = "time") -> str:
    """Search again with twice the memory, twice the batch, and twice the network, and describe the changes.

    Args:
      best: the first of the search itself, so that estimates are compared with estimates.
    """
    chip = cluster.chip
    batch = 2 * config.train.global_batch_size
    cases: list[tuple[str, Config, Cluster]] = []
    if chip.memory_bytes:
        roomier = dataclasses.replace(chip, memory_bytes=2 * chip.memory_bytes)
        cases.append((f"twice the memory ({2 * chip.memory_bytes / 1e9:,.0f} GB a chip)", config, _with(cluster, roomier)))
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=batch))
    cases.append((f"twice the batch ({batch:,} sequences a step)", larger, cluster))
    if chip.nic_bandwidth and cluster.hosts > 1:
        faster = dataclasses.replace(chip, nic_bandwidth=2 * chip.nic_bandwidth)
        cases.append(
            (f"a network twice as fast ({2 * chip.nic_bandwidth / 1e9:,.0f} GB/s a chip)", config, _with(cluster, faster))
        )
    said, left, began = [], [], time.process_time()
    for name, other, where in cases:
        if time.process_time() - began > SECONDS_TO_ASK:
            left.append(name)
        else:
            said.append(_outcome(name, best, search(other, where), objective))
    if left:
        said.append(f"Not tried, since a search takes long here: {listed(left)}.")
    return " ".join(said)


def _with(cluster: Cluster, chip: Chip) -> Cluster:
    return dataclasses.replace(cluster, chip=chip)


def _outcome(name: str, best: Estimate, found: SearchResult, objective: str) -> str:
    if not found.ranked:
        return f"With {name} nothing would fit."
    other = found.ranked[0]
    gain = best.score(objective) / other.score(objective) - 1
    unit = "tokens a joule" if objective == "energy" else "tokens/s"
    verdict = "nothing gained" if abs(gain) < NEGLIGIBLE else f"{abs(gain):.1%} {'more' if gain > 0 else 'fewer'} {unit}"
    mfu = f" at {percent(other.mfu)} MFU" if other.mfu is not None else ""
    same = _layout(other.config) == _layout(best.config)
    which = "the same layout" if same else layout_words(other)
    return f"With {name} the best is {which}: {verdict}{mfu}."


def _layout(config: Config) -> tuple[object, ...]:
    train = config.train
    return config.mesh, config.pipeline, config.sharding, train.microbatches, train.remat, train.remat_save


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be, and what it takes


def why_nothing_fits(config: Config, cluster: Cluster, found: SearchResult) -> str:
    """Return how far from fitting the cluster is, and the smallest that would do."""
    if not found.candidates:
        return (
            f"No layout of {config.name} is valid on {cluster_words(cluster)}: {config.train.global_batch_size} sequences a "
            f"step, {config.model.num_layers} layers and {config.model.num_heads} heads cannot be shared out over them; "
            "change train.global_batch_size or the number of devices."
        )
    said = [f"{config.name} does not fit on {cluster_words(cluster)}: none of {found.candidates:,} layouts does."]
    if found.leanest:
        memory = found.leanest.memory
        said.append(
            f"The leanest, {mesh_words(found.leanest.config.mesh)}, needs {gib(memory.total)} GiB on its fullest device, which "
            f"has {gib(cluster.budget_bytes)} to give; most of it for {_largest(memory)}."
        )
    if found.smallest:
        said.append(f"The smallest cluster that would do is {cluster_words(found.smallest)}: --hosts={found.smallest.hosts}.")
    else:
        said.append("No number of such hosts would do: a chip with more memory, a smaller batch or shorter sequences might.")
    return " ".join(said)


def bill_words(bill: Bill) -> str:
    """Return the cost of the whole run in a sentence."""
    words = [
        f"{scaled(bill.tokens)} tokens are {bill.steps:,} steps: {duration(bill.seconds)}, {bill.gpu_hours:,.0f} GPU-hours"
    ]
    if bill.kilowatt_hours is not None:
        words.append(f"{bill.kilowatt_hours:,.0f} kWh in the chips alone")
    if bill.money is not None:
        words.append(f"{bill.money:,.0f} at the price given")
    said = ", ".join(words) + "."
    if bill.deadline_seconds is not None:
        times = bill.seconds / bill.deadline_seconds
        late = f"that is {times:.2g} times as long as asked" if times > 1 else f"that leaves {1 - times:.0%} of the time asked"
        said += f" {duration(bill.deadline_seconds)} were asked: {late}."
    return said
