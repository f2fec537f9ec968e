"""How long a step of one layout takes on one cluster, in closed form, from what it computes (`roofline`) and moves (`traffic`).

A step is passes: with T_F and T_B ticks in which any stage runs a forward or a backward pass, stages in lock-step,

    step = T_F (l f + p) + T_B (l b + q) + M (loss, embedding) + gradients + update

l layers a pass, f and b seconds of a layer with the waits for transfers that nothing hides, p and q what a pass waits for at
its ends. A stage works in k M of the T_F ticks (k chunks, M microbatches); the rest is the *bubble*.

**Overlap**, as this trainer's program has it (BENCHMARKS.md, "the schedule of the GPU program"):

* fsdp's gathers and scatters of a layer travel behind a layer's compute; those of the first and the last layer of a pass do
  not.
* transfers along tensor and expert travel behind the other half of the rows where layers take turns, else behind nothing.
* the ring of context attention travels behind attention; gather and ulysses behind nothing.
* of what could be hidden, a share stays exposed (UNHIDDEN: bytes with no matmul between start and end in compiled programs).
* boundary activations travel behind the backward pass of the same tick; their gradients, and all that happens once a step,
  behind nothing.

Links inside a host and NICs work at the same time. Energy: `hardware.predicted_watts` of every chip over the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtrain.config import Config, MeshConfig
from jaxtrain.hardware import predicted_watts
from jaxtrain.layout import layers_per_part, moments_on_device, parts_in_turns, rows_of_device
from jaxtrain.ops.attention_choice import context_kind
from jaxtrain.ops.float8_choice import choose_matmuls
from jaxtrain.parallel.pipeline_counts import Passes, count_passes, waiting_time
from jaxtrain.planner import roofline
from jaxtrain.planner.candidate import Candidate, layout_of, stand_in, with_layout
from jaxtrain.planner.estimates import Cluster, Estimate, StepTime, Wire
from jaxtrain.planner.formulas import head_flops, layer_flops, parameters_trained, scoring_flops
from jaxtrain.planner.formulas_collectives import PARTS, uncovered
from jaxtrain.planner.layer_table import BYTES
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.other_models import forward_model
from jaxtrain.planner.rollouts import rollout_seconds
from jaxtrain.planner.roofline import Seconds
from jaxtrain.planner.traffic import Flow, Placement, Times, flows_by_phase, place, require_links, seconds, wire
from jaxtrain.telemetry.flops import model_flops_per_step

UNHIDDEN = {"weights": 0.06, "sequence": 0.11, "experts": 0.5, "context": 0.06, "gradients": 0.06}
"""Share of the bytes that could travel behind matmuls, and do not: 7b on fsdp=64, 70b on fsdp=32 x tensor=8, mixtral_8x7b on
fsdp=8 x expert=8, compiled for H100s (BENCHMARKS.md, "no matmul")."""
STEP_OVERHEAD = 1e-3
"""Seconds of a step in which the device has no kernel: the host's dispatch, metrics, the batch."""


@dataclass(frozen=True)
class Practice:
    """The transfers that a program hides; by default as this trainer does. Published runs are compared with what they do."""

    hides_tensor: bool = False
    """Transfers along tensor travel behind the matmul that they feed, whatever the number of rows (Megatron's
    tp-comm-overlap, torchtitan's async TP)."""
    hides_gradients: bool = False
    """What is summed over data once a step travels behind the last backward pass (Megatron's overlap-grad-reduce)."""
    fuses_accumulation: bool = False
    """A weight's gradient is added to the sum over microbatches by the matmul that makes it (Megatron's
    gradient-accumulation-fusion)."""
    attention_share: float = 1.0
    """Speed of its attention kernel over that of cuDNN's."""


OURS = Practice()


@functools.lru_cache(maxsize=65536)
def _axes_present(mesh: tuple[int, ...]) -> tuple[bool, ...]:
    """Return which axes are above 1."""
    return tuple(size > 1 for size in mesh)


@functools.lru_cache(maxsize=256)
def _parts_that_move(present: tuple[bool, ...]) -> tuple[str, ...]:
    """Return the parts of `PARTS` that move anything where these axes are above 1."""
    _, pipe, _, fsdp, expert, context, tensor = present
    moves = {"weights": fsdp, "sequence": tensor, "loss": tensor, "pipe": pipe}
    moves |= {"experts": expert, "context": context}
    return tuple(part for part in PARTS if moves.get(part, any(present)))


class _Direction(NamedTuple):
    """One layer in a pass in one direction, and what the pass does at its ends."""

    work: Seconds
    waits: float
    """Seconds a layer waits for transfers."""
    hidden: Mapping[str, float]
    """Of parts of `PARTS`, the share that travels behind compute."""
    ends: float
    """Seconds a pass waits for its first or last layer's weights."""


class _Shared(NamedTuple):
    """The parts that layouts have in common that differ in their schedule alone. Seconds of waiting for..."""

    forward: _Direction
    backward: _Direction
    outer: Seconds
    """Embedding and loss of one microbatch."""
    outer_waits: float
    """their transfers, a microbatch"""
    send_on: float
    """activations sent to the next stage, once"""
    send_back: float
    once: float
    """all that is not a gradient, a step"""
    held: float
    """the same for each layer that a stage holds"""
    gradients_once: float
    gradients_held: float


class Step(NamedTuple):
    """One layout's step, taken apart."""

    time: StepTime
    passes: Passes
    layers: int
    forward: _Direction
    backward: _Direction


class CostModel:
    """Times layouts of one model, batch and cluster. Parts that layouts share are computed once: a layout takes some 50 us.

    Raises:
      ExplainedError: the cluster's chip lacks a figure without which nothing can be timed.
    """

    def __init__(self, config: Config, cluster: Cluster, practice: Practice = OURS):
        self.config, self.cluster, self.practice = config, cluster, practice
        self.is_approximate = bool(uncovered(config))
        self.base = stand_in(config)
        self.chip = roofline.roofline(cluster.chip, config.model.dtype, practice.attention_share)
        if cluster.devices > 1:
            require_links(cluster.chip, cluster.hosts)
        self._known: dict[Hashable, Any] = {}
        before = forward_model(config)
        self.before_step = CostModel(before, cluster, practice) if before else None
        """Costs of the model that goes forward over each batch first."""

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = make()
        return found

    def rows(self, layout: Candidate) -> int:
        """Return the sequences of one microbatch on one device."""
        return rows_of_device(self.config.train.global_batch_size, MeshConfig(*layout.mesh), layout.microbatches)

    def takes_turns(self, layout: Candidate) -> bool:
        """Return whether layers run on two halves of the rows, so that transfers of activations can hide."""
        return parts_in_turns(self.config.sharding, MeshConfig(*layout.mesh), self.rows(layout)) > 1

    # -- what layouts share ------------------------------------------------------------------------------------------

    def _work(self, layout: Candidate, rows: int, turns: bool) -> tuple[tuple[Seconds, ...], tuple[Seconds, ...], Seconds]:
        """((forward, backward) of a layer but for its gradients' sums, of the embedding, of the loss)"""
        _, _, _, _, expert, context, tensor = layout.mesh

        def make() -> Any:
            config = with_layout(self.base, layout)
            return (
                roofline.layer_work(config, self.chip, 2 if turns else 1),
                roofline.embedding_work(config, self.chip),
                roofline.loss_work(config, self.chip),
            )

        return self._once(("work", rows, expert, context, tensor, layout.remat, layout.remat_save, turns), make)

    def _sums(self, layout: Candidate) -> Seconds:
        """Return the seconds of adding one layer's gradients up, in one backward pass."""
        _, _, _, fsdp, expert, _, tensor = layout.mesh
        at_once = self.practice.fuses_accumulation
        return self._once(
            ("sums", fsdp, expert, tensor, layout.zero),
            lambda: roofline.gradient_work(with_layout(self.base, layout), self.chip, at_once),
        )

    def _key(self, part: str, layout: Candidate, rows: int) -> Hashable:
        """Return everything that a part's flows depend on."""
        _, pipe, _, fsdp, expert, context, tensor = layout.mesh
        joined, remat, present = pipe * layout.chunks == 1, (layout.remat, layout.remat_save), _axes_present(layout.mesh)
        keys: dict[str, tuple] = {
            "weights": (fsdp, expert, tensor, layout.zero, joined),
            "gradients": (fsdp, expert, tensor, present, layout.zero, joined),
            "sequence": (rows, context, tensor, remat),
            "loss": (rows, context, tensor),
            "pipe": (present, rows, context, tensor, layout.folded),
            "experts": (rows, expert, context, tensor, remat),
            "context": (rows, context, tensor, layout.context, remat, layout.microbatches),
            "scalars": (present,),
            "optimizer": (layout.mesh, layout.chunks),
        }
        return keys[part]

    def flows(self, part: str, layout: Candidate, rows: int) -> dict[str, tuple[Flow, ...]]:
        """Return what a part of `PARTS` moves, by phase."""

        def make() -> dict[str, tuple[Flow, ...]]:
            flows = flows_by_phase(PARTS[part](with_layout(self.base, layout)))
            if self.config.sync.sums_apart:
                inside = {phase: [_inside_replica(flow) for flow in found] for phase, found in flows.items()}
                flows = {phase: tuple(flow for flow in found if flow.axes) for phase, found in inside.items()}
            return flows

        return self._once((part, self._key(part, layout, rows)), make)

    def _times(self, part: str, layout: Candidate, rows: int, placement: Placement) -> dict[str, Times]:
        """Time a part's transfers by phase; phases in which nothing moves are left out.

        What moves for each layer that a stage holds goes in one call a step.
        """

        def make() -> dict[str, Times]:
            times: dict[str, Times] = {}
            for phase, flows in self.flows(part, layout, rows).items():
                for flow in flows:
                    if phase == "held":
                        begin = seconds(flow._replace(payload=0.0, calls=1), placement, self.cluster.chip)
                        times["once"] = times.get("once", Times()).plus(begin)
                        flow = flow._replace(calls=0)
                    times[phase] = times.get(phase, Times()).plus(seconds(flow, placement, self.cluster.chip))
            return times

        return self._once((part, "times", self._key(part, layout, rows), placement.inside, placement.across), make)

    def _parameters(self, layout: Candidate) -> float:
        """Return the parameters that one device updates."""
        _, pipe, _, fsdp, expert, _, tensor = layout.mesh
        key = ("parameters", pipe, layout.chunks, fsdp, expert, tensor)
        return self._once(key, lambda: parameters_trained(with_layout(self.base, layout)))

    def _muon(self, layout: Candidate) -> tuple[float, float]:
        """Return `roofline.muon_work` of a layout."""
        key = ("muon", layout.mesh, layout.chunks)
        return self._once(key, lambda: roofline.muon_work(with_layout(self.base, layout), self.chip))

    def state_bytes(self, layout: Candidate) -> float:
        """Return the bytes of parameters and moments of one device: less than the layout takes."""
        model, rule = self.config.model, self.config.optimizer
        return (BYTES[model.param_dtype] + BYTES[rule.moments_dtype] * moments_on_device(rule)) * self._parameters(layout)

    # -- one layout --------------------------------------------------------------------------------------------------

    def _direction(
        self, phase: str, work: Seconds, times: Mapping[str, Mapping[str, Times]], turns: bool, ring: bool
    ) -> _Direction:
        """Time one layer in the forward or the backward direction: what its compute hides of its transfers."""
        phase = "layer_" + phase
        hides = {"weights": True, "gradients": True, "sequence": turns or self.practice.hides_tensor, "experts": turns}
        link = nic = floor = waits = ends = 0.0
        for part in ("weights", "gradients", "sequence", "experts"):
            time = times.get(part, {}).get(phase)
            if time is None:
                continue
            if not hides[part]:
                waits += time.total
                continue
            link, nic = link + time.link, nic + time.nic
            floor += UNHIDDEN[part] * time.total
            if part in ("weights", "gradients"):
                ends += time.total
        exposed = max(max(link, nic) - work.total, floor)
        exposed += self.chip.taken * max(0.0, link + nic - exposed)
        share = 1.0 - min(1.0, exposed / (link + nic)) if link + nic else 0.0
        hidden = {part: share if hides[part] else 0.0 for part in hides}
        round_ring = times.get("context", {}).get(phase, Times()).total
        if round_ring:
            shown = max(round_ring - work.attention, UNHIDDEN["context"] * round_ring) if ring else round_ring
            waits, hidden = waits + shown, hidden | {"context": 1 - shown / round_ring}
        return _Direction(work, waits + exposed, hidden, ends)

    def _shared(self, layout: Candidate, rows: int) -> _Shared:
        """Return what layouts have in common that differ in their schedule alone."""
        turns = self.takes_turns(layout)
        (ahead, back), (embed, embed_back), loss = self._work(layout, rows, turns)
        placement = place(layout.mesh, self.cluster.devices_per_host)
        times = {part: self._times(part, layout, rows, placement) for part in _parts_that_move(_axes_present(layout.mesh))}
        ring = layout.mesh[5] > 1 and self._context_kind(layout) == "ring"
        outer_waits = sum(
            found[phase].total
            for part, found in times.items()
            if part not in ("pipe", "scalars")
            for phase in ("forward", "backward")
            if phase in found
        )
        once, held = ({part: found[p].total for part, found in times.items() if p in found} for p in ("once", "held"))
        sends = times.get("pipe", {})
        return _Shared(
            forward=self._direction("forward", ahead, times, turns, ring),
            backward=self._direction("backward", back + self._sums(layout), times, turns, ring),
            outer=loss + embed_back + (embed if layout.mesh[1] == 1 else Seconds()),
            outer_waits=outer_waits,
            send_on=sends["forward"].total if sends else 0.0,
            send_back=sends["backward"].total if sends else 0.0,
            once=sum(once.values()) - once.get("gradients", 0.0) + self._replica_seconds(),
            held=sum(held.values()) - held.get("gradients", 0.0),
            gradients_once=once.get("gradients", 0.0),
            gradients_held=held.get("gradients", 0.0),
        )

    def forward_seconds(self, layout: Candidate) -> float:
        """Return the seconds of a forward pass of the batch alone, which waits for all its sends.

        The head takes one matmul of the three that it takes with gradients.
        """
        step, shared = self.step(layout), self._shared_of(layout)
        one = step.layers * (step.forward.work.total + step.forward.waits) + step.forward.ends + shared.send_on
        return step.passes.forward * one + layout.microbatches * (shared.outer.total + shared.outer_waits) / 3

    def _shared_of(self, layout: Candidate) -> _Shared:
        rows, joined = self.rows(layout), layout.mesh[1] * layout.chunks == 1
        key = (layout.mesh, rows, layout.remat, layout.remat_save, layout.zero, layout.context, joined, layout.folded)
        return self._once(key, lambda: self._shared(layout, rows))

    def step(self, layout: Candidate) -> Step:
        """Return the step of a valid layout."""
        pipe, chunks, microbatches = layout.mesh[1], layout.chunks, layout.microbatches
        shared = self._shared_of(layout)
        forward, backward = shared.forward, shared.backward
        passes = count_passes(layout.schedule, pipe, chunks, microbatches)
        layers = layers_per_part(self.base.model.stacked_layers, pipe, chunks, len(self.base.model.kinds))
        key = ("weight", layout.mesh, self.rows(layout))
        weight = self._once(key, lambda: roofline.weight_seconds(with_layout(self.base, layout), self.chip))
        one_forward = layers * (forward.work.total + forward.waits) + forward.ends
        one_backward = layers * (backward.work.total + backward.waits) + backward.ends
        busy, busy_layers = chunks * microbatches, chunks * microbatches * layers

        gradients = shared.gradients_once + shared.gradients_held * layers * chunks
        if self.practice.hides_gradients:
            gradients = max(gradients - one_backward, UNHIDDEN["gradients"] * gradients)
        waits = busy_layers * (forward.waits + backward.waits) + busy * (forward.ends + backward.ends)
        waits += microbatches * shared.outer_waits + shared.once + shared.held * layers * chunks + gradients
        waits += (passes.forward - passes.both) * shared.send_on + passes.backward * shared.send_back
        time = StepTime(
            matmul=busy_layers * (forward.work.matmul + backward.work.matmul) + microbatches * shared.outer.matmul,
            attention=busy_layers * (forward.work.attention + backward.work.attention),
            memory_bound=busy_layers * (forward.work.memory_bound + backward.work.memory_bound)
            + microbatches * shared.outer.memory_bound,
            optimizer=roofline.optimizer_seconds(self.config, self.chip, self._parameters(layout)) + self._muon(layout)[1],
            exposed=waits,
            bubble=waiting_time((layout.schedule, pipe, chunks, microbatches), one_forward, one_backward, layers * weight),
            overhead=busy_layers * (forward.work.overhead + backward.work.overhead)
            + microbatches * shared.outer.overhead
            + STEP_OVERHEAD,
            other_models=self.before_step.forward_seconds(layout) if self.before_step else 0.0,
            rollouts=rollout_seconds(self, layout, forward.work.total + forward.waits),
        )
        return Step(time, passes, layers, forward, backward)

    def _replica_seconds(self) -> float:
        """Return the mean seconds that a step waits for an exchange between replicas that is not a sum in every step.

        It is an all-reduce of what a replica holds, in the dtype that travels, every so many steps, none of it hidden.
        """
        sync, replicas = self.config.sync, self.config.mesh.replica
        if replicas <= 1 or not sync.sums_apart:
            return 0.0
        bytes_each = {"none": 4, "bfloat16": 2, "int8": 1, "float8": 1}[sync.compression]
        shard = self._parameters(layout_of(self.config)) * bytes_each
        flow = Flow("replica", "all-reduce", "f32", 1, shard)
        steps = sync.every if sync.replicas_differ else 1
        return seconds(flow, place(self.config.mesh.shape, self.cluster.devices_per_host), self.cluster.chip).total / steps

    def _context_kind(self, layout: Candidate) -> str:
        _, _, _, _, _, context, tensor = layout.mesh
        return self._once(("kind", context, tensor, layout.context), lambda: context_kind(with_layout(self.base, layout))[0])

    def estimate(self, layout: Candidate) -> Estimate:
        """Return the estimate of a valid layout."""
        config, step = with_layout(self.config, layout), self.step(layout)
        length, batch = config.data.sequence_length, config.train.global_batch_size
        return Estimate(
            config=config,
            cluster=self.cluster,
            origin="approximate" if self.is_approximate else "estimate",
            memory=estimate_memory(config),
            time=step.time,
            wires=self._wires(layout, step),
            flops=self._flops(layout, step),
            model_flops=model_flops_per_step(config.model, length, batch, "full"),
            joules=joules(step.time, self.cluster),
        )

    def _flops(self, layout: Candidate, step: Step) -> float:
        """Return the matmul FLOPs of a device in a step, of the passes in which it works."""
        config, passes = with_layout(self.base, layout), layout.chunks * layout.microbatches
        layers, (ahead, back) = passes * step.layers, layer_flops(config, "cudnn")
        computed = layers * (ahead + back) + layout.microbatches * head_flops(config) + self._muon(layout)[0]
        return computed + scoring_flops(config, ahead, layers, layout.microbatches)

    def _wires(self, layout: Candidate, step: Step) -> tuple[Wire, ...]:
        """Return everything that a device sends in a step, by axes, kind and dtype, the longest first."""
        rows, placement = self.rows(layout), place(layout.mesh, self.cluster.devices_per_host)
        m, (ahead, back, both) = layout.microbatches, step.passes
        counts = {"layer_forward": ahead * step.layers, "layer_backward": back * step.layers, "forward": m, "backward": m}
        counts |= {"held": step.layers * layout.chunks, "once": 1}
        ticks = counts | {"forward": ahead, "backward": back}
        sums: dict[tuple[str, str, str], list[float]] = {}
        for part in PARTS:
            for phase, flows in self.flows(part, layout, rows).items():
                count = ticks[phase] if part == "pipe" else counts[phase]
                hidden = 0.0
                if phase.startswith("layer_"):
                    hidden = (step.forward if phase == "layer_forward" else step.backward).hidden.get(part, 0.0)
                elif part == "pipe" and phase == "forward":
                    hidden = both / ahead
                for flow in flows:
                    calls = flow.calls if phase != "held" else 1 / count
                    spent = count * seconds(flow._replace(calls=calls), placement, self.cluster.chip).total
                    total = sums.setdefault((flow.axes, flow.kind, flow.dtype), [0.0, 0.0, 0.0])
                    for i, more in enumerate((count * wire(flow, placement), spent, spent * (1 - hidden))):
                        total[i] += more
        wires = [Wire(*key, *total, crosses_hosts=placement.of(key[0])[1] > 1) for key, total in sums.items()]
        return tuple(sorted(wires, key=lambda wire: -wire.seconds))


def joules(time: StepTime, cluster: Cluster) -> float | None:
    """Return the energy of all chips in a step, which idle in waits and bubble; None if the chip's power is not published."""
    watts = predicted_watts(cluster.chip, 1 - (time.exposed + time.bubble) / time.total)
    return None if watts is None else watts * time.total * cluster.devices


def _inside_replica(flow: Flow) -> Flow:
    """Return the flow without axis `replica`."""
    return flow._replace(axes="+".join(axis for axis in flow.axes.split("+") if axis != "replica"))


def estimate(config: Config, cluster: Cluster) -> Estimate:
    """Return the estimate of a valid config (its mesh resolved for the cluster's devices), from closed forms alone.

    Where they do not speak of a part of it (`formulas_collectives.uncovered`), the estimate is of the nearest config that they
    speak of, and its origin is "approximate".

    Raises:
      ExplainedError: a figure of the chip is not known.
      ConfigError: the mesh does not fill hosts evenly.
    """
    return CostModel(choose_matmuls(config, cluster.chip)[0], cluster).estimate(layout_of(config))
