"""Find the best layouts of a model on a cluster: time all of `space` with `cost`, and check the fastest against the memory.

Times are cheap, memory less so; so all layouts are timed, and then checked from the best on until enough fit. A
layout whose parameters and moments alone are too large is dropped at once.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import replace
from typing import Literal

from jaxtrain.config import Config
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ConfigError
from jaxtrain.planner.candidate import Candidate, with_layout
from jaxtrain.planner.cost import OURS, CostModel, Practice, joules
from jaxtrain.planner.estimates import Cluster, Point, SearchResult, axes_in_use
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.space import POLICIES, Space

Objective = Literal["time", "energy", "cost"]
RANKED, DRAWN = 20, 800
KIND_LOOKS = 3000
"""Number of layouts of other kinds than the best whose memory is checked, to find one that fits."""
PARETO_STEP = 0.02
"""A slower layout is on the Pareto front if it saves at least this share of the memory."""
MOST_HOSTS = 8192
HOSTS = sorted(n for a in range(14) for n in (2**a, 3 * 2**a) if n <= MOST_HOSTS)
DOES_NOT_FIT = "does not fit"
STATE_DOES_NOT_FIT = "parameters and optimizer state alone do not fit"


def search(
    config: Config,
    cluster: Cluster,
    objective: Objective = "time",
    ranked: int = RANKED,
    practice: Practice = OURS,
) -> SearchResult:
    """Return the best layouts of a config's model, data, batch and optimizer on all devices of a cluster.

    The config's mesh, schedule, chunks, microbatches, remat and ZeRO are ignored, except mesh.replica,
    sharding.context_attention (if not auto), and remat_save with remat=named.

    Args:
      objective: time: seconds of a step; energy: joules of a step; cost: money of a step, proportional to time on one cluster.
      ranked: how many layouts to rank: the best one of each mesh.
      practice: what the program overlaps; another program's, to compare the planner with published runs.

    Raises:
      ConfigError: the config is wrong whatever the layout.
      ExplainedError: a figure of the chip is not known.
    """
    begin = time.perf_counter()
    hunt = _Hunt(config, cluster, objective, practice)
    best = hunt.first_that_fit(ranked) if any(hunt.fits(layout) for layout in hunt.lean) else []
    estimates = tuple(hunt.model.estimate(layout) for layout in best)
    for estimate in estimates:
        _, problems = find_problems(estimate.config, cluster.devices)
        if problems:
            raise ConfigError(problems)
    kinds = hunt.first_of_other_kinds(best) if best else []
    hunt.look_around()
    least = min(hunt.lean, key=hunt.bytes, default=None) if not best else None
    return SearchResult(
        ranked=estimates,
        candidates=hunt.candidates,
        pruned=dict(hunt.space.pruned),
        points=hunt.points(),
        pareto=tuple(hunt.model.estimate(layout) for layout in hunt.pareto()),
        smallest=None if best else smallest_cluster(config, cluster),
        leanest=hunt.model.estimate(least) if least else None,
        seconds=time.perf_counter() - begin,
        kinds=tuple(hunt.model.estimate(layout) for layout in kinds),
    )


class _Hunt:
    """One search: layouts in ranking order, and the memory of those that were checked.

    The queue begins with the layouts that recompute nothing. Other remat policies take longer, so they enter it when such a
    layout comes up and does not fit.
    """

    def __init__(self, config: Config, cluster: Cluster, objective: Objective, practice: Practice):
        self.config, self.objective, self.budget = config, objective, cluster.budget_bytes
        self.model = CostModel(config, cluster, practice)
        self.space = Space(config, cluster.devices, cluster.devices_per_host)
        self.queue: list[tuple[float, int, Candidate]] = []
        self.lean: list[Candidate] = []
        self.known: dict[Candidate, tuple[float, float]] = {}
        self.rooms: dict[tuple[int, ...], bool] = {}
        self.candidates = 0
        for mesh in self.space.meshes():
            self.lean += self.space.leanest(mesh)
            self._enqueue(mesh)
        self.everything = [layout for _, _, layout in self.queue]
        heapq.heapify(self.queue)

    def _enqueue(self, mesh: tuple[int, ...]) -> None:
        for layout in self.space.layouts(mesh):
            self.candidates += POLICIES
            if self.model.state_bytes(layout) > self.budget:
                self.space.pruned[STATE_DOES_NOT_FIT] += POLICIES
            else:
                self.queue.append((self.value(layout), len(self.queue), layout))

    def value(self, layout: Candidate) -> float:
        """Return the quantity that layouts are ranked by."""
        time = self.model.step(layout).time
        energy = joules(time, self.model.cluster) if self.objective == "energy" else None
        return time.total if energy is None else energy

    def look_into(self, layout: Candidate) -> tuple[float, float]:
        """(seconds of a step, bytes on the fullest device)."""
        if layout not in self.known:
            held = estimate_memory(with_layout(self.config, layout)).total
            self.known[layout] = self.model.step(layout).time.total, held
        return self.known[layout]

    def bytes(self, layout: Candidate) -> float:
        """Return the bytes on the fullest device."""
        return self.look_into(layout)[1]

    def fits(self, layout: Candidate) -> bool:
        """Return whether the fullest device has room."""
        return self.model.state_bytes(layout) <= self.budget and self.bytes(layout) <= self.budget

    def has_room(self, mesh: tuple[int, ...]) -> bool:
        """Return whether a mesh has a layout that fits: else none of its layouts is checked."""
        if mesh not in self.rooms:
            self.rooms[mesh] = any(self.fits(layout) for layout in self.space.leanest(mesh))
        return self.rooms[mesh]

    def first_that_fit(self, most: int) -> list[Candidate]:
        """Return the best fitting layout of each mesh, best first, until there are enough."""
        best: dict[tuple[int, ...], Candidate] = {}
        while self.queue and len(best) < most:
            _, number, layout = heapq.heappop(self.queue)
            if layout.mesh in best:
                continue
            if not self.has_room(layout.mesh):
                self.space.pruned[DOES_NOT_FIT] += POLICIES
                continue
            if self.bytes(layout) <= self.budget:
                best[layout.mesh] = layout
                continue
            self.space.pruned[DOES_NOT_FIT] += 1
            if layout.remat == "none":
                for other in self.space.remats(layout):
                    heapq.heappush(self.queue, (self.value(other), number, other))
        return list(best.values())

    def first_of_other_kinds(self, best: list[Candidate]) -> list[Candidate]:
        """Return the best fitting layout of each kind of mesh that is not among the best, best first."""
        kinds, found, looks = {axes_in_use(layout.mesh) for layout in best}, [], 0
        while self.queue and looks < KIND_LOOKS:
            _, number, layout = heapq.heappop(self.queue)
            if axes_in_use(layout.mesh) in kinds or not self.has_room(layout.mesh):
                continue
            looks += 1
            if self.bytes(layout) <= self.budget:
                kinds.add(axes_in_use(layout.mesh))
                found.append(layout)
            elif layout.remat == "none":
                for other in self.space.remats(layout):
                    heapq.heappush(self.queue, (self.value(other), number, other))
        return found

    def look_around(self) -> None:
        """Check layouts spread over the whole space, and the smallest ones, for the map and the Pareto front."""
        for number, layout in enumerate(self.everything[:: max(1, len(self.everything) // DRAWN)]):
            self.look_into((layout, *self.space.remats(layout))[number % POLICIES])
        for layout in self.lean[:: max(1, len(self.lean) // DRAWN)]:
            if self.model.state_bytes(layout) <= self.budget:
                self.look_into(layout)

    def pareto(self) -> list[Candidate]:
        """Return the fitting layouts that no checked layout beats in both time and memory, fastest first."""
        front: list[Candidate] = []
        least = self.budget
        for layout, (_, held) in sorted(self.known.items(), key=lambda item: item[1]):
            if held <= least:
                front.append(layout)
                least = held * (1 - PARETO_STEP)
        return front

    def points(self) -> tuple[Point, ...]:
        """Return all checked layouts."""
        return tuple(Point(seconds, held, layout.mesh, held <= self.budget) for layout, (seconds, held) in self.known.items())


def smallest_cluster(config: Config, cluster: Cluster) -> Cluster | None:
    """Return the smallest cluster of more such hosts on which some layout fits; None if none of at most MOST_HOSTS does.

    Numbers of hosts are powers of two and three times such, which axes can factor; of each mesh, only small layouts are tried.
    """
    for hosts in HOSTS:
        if hosts <= cluster.hosts:
            continue
        larger = replace(cluster, hosts=hosts)
        space = Space(config, larger.devices, larger.devices_per_host)
        lean = (layout for mesh in space.meshes() for layout in space.leanest(mesh))
        if any(estimate_memory(with_layout(config, layout)).total <= larger.budget_bytes for layout in lean):
            return larger
    return None
