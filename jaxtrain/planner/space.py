"""Every layout that a search looks at: all valid meshes, and on each all microbatches, schedules, remat policies, ZeRO levels
and kinds of context attention that can be worth it.

The rules are those of `config/rules.py`, said as what to generate; a test holds the two together. What is left out beside
what is not valid, since nothing or little is lost:

* GPipe: 1F1B takes the same ticks and holds no more.
* Chunks other than those that cut a stage's layers into halves, quarters, and so on; interleaving where microbatches are not a
  multiple of the stages, whose ticks are not full. Where a batch has many divisors, numbers of microbatches close to another.
* `gather` along context, unless it is asked for: it holds the whole length, and nothing hides it.
* ZeRO levels where fsdp is 1: they are all the same.

Replicas stay as they are given: they change what training does.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxtrain.config import Config, MeshConfig, ModelConfig
from jaxtrain.config.rules import divisors
from jaxtrain.errors import ConfigError
from jaxtrain.models.decoder import check_base
from jaxtrain.planner.candidate import Candidate
from jaxtrain.planner.layer_table import trained_weights
from jaxtrain.planner.traffic import place
from jaxtrain.train.moments import cut_block

MOST_MICROBATCHES = 12
MOST_FILLED = 8
"""Microbatches a stage above which zero_bubble is not tried: 1f1b's bubble is below 11% then, and more is held."""
POLICIES = 4
"""Remat policies."""


@dataclass
class Space:
    """The layouts of a config on hosts of devices; `pruned` counts what was left out, by reason, as it is gone through."""

    config: Config
    devices: int
    devices_per_host: int
    pruned: Counter[str] = field(default_factory=Counter)

    def meshes(self) -> Iterator[tuple[int, ...]]:
        """Yield all valid meshes of all the devices, in the order of MESH_AXES.

        Those that differ in data and fsdp only come one after the other.
        """
        config, replica = self.config, self.config.mesh.replica
        if self.devices % replica:
            return
        batch = config.train.global_batch_size
        for expert in self._experts(self.devices // replica):
            for tensor, context in self._activation_axes(self.devices // (replica * expert)):
                rest = self.devices // (replica * expert * tensor * context)
                for pipe in divisors(rest):
                    if max(pipe, tensor, expert) > 1 and config.train.layer_inputs_memory == "host":
                        self.pruned["layers' inputs in the host's memory: neither pipe, tensor nor expert"] += 1
                    elif pipe > self._groups():
                        self.pruned["more pipeline stages than layers"] += 1
                    elif batch % (replica * expert * (rest // pipe)):
                        self.pruned["the global batch does not divide by the data-parallel devices"] += 1
                    else:
                        yield from self._splits((replica, pipe, rest // pipe, expert, context, tensor))

    def _splits(self, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield all ways to share the devices of one axis out between data and fsdp."""
        replica, pipe, both, expert, context, tensor = shape
        for fsdp in divisors(both):
            mesh = (replica, pipe, both // fsdp, fsdp, expert, context, tensor)
            if not _cuts_embed(self.config.model, fsdp):
                self.pruned["fsdp does not divide the model's width"] += 1
            elif not self._cuts_between_groups(fsdp, tensor):
                self.pruned["the groups of lora.base, or the blocks of moments, would be cut"] += 1
            elif not self._fills_hosts(mesh):
                self.pruned["axes do not fill hosts"] += 1
            else:
                yield mesh

    def _cuts_between_groups(self, fsdp: int, tensor: int) -> bool:
        mesh, model = MeshConfig(fsdp=fsdp, tensor=tensor), self.config.model
        try:
            check_base(model, mesh)
        except ConfigError:
            return False
        weights = itertools.chain(*trained_weights(model, self.config.train.frozen))
        is_in_8_bits = self.config.optimizer.moments_dtype == "int8"
        return not (is_in_8_bits and any(cut_block(weight.dims, weight.shape, mesh) for weight in weights))

    def _fills_hosts(self, mesh: tuple[int, ...]) -> bool:
        try:
            place(mesh, self.devices_per_host)
        except ConfigError:
            return False
        return True

    def _groups(self) -> int:
        """Return the groups of layers that parts of a pipeline hold whole (`model.pattern`)."""
        return math.ceil(self.config.model.stacked_layers / len(self.config.model.kinds))

    def _experts(self, devices: int) -> list[int]:
        moe = self.config.model.moe
        return [n for n in divisors(devices) if moe.num_experts % n == 0] if moe else [1]

    def _activation_axes(self, devices: int) -> Iterator[tuple[int, int]]:
        """(tensor, context)"""
        for tensor in divisors(devices):
            if not _cuts_heads(self.config.model, tensor):
                self.pruned["tensor does not divide heads, MLP width or vocabulary"] += 1
                continue
            for context in divisors(devices // tensor):
                unit = math.lcm(2 * context if context > 1 else 1, context * tensor)
                if self.config.data.sequence_length % unit or not self._groups_fit(context):
                    self.pruned["the sequence cannot be cut into so many pieces"] += 1
                else:
                    yield tensor, context

    def _groups_fit(self, context: int) -> bool:
        """Return whether groups of tokens that share experts' room lie whole on a device."""
        moe, length = self.config.model.moe, self.config.data.sequence_length
        if moe is None or moe.dispatch != "capacity":
            return True
        return (length if context == 1 else length // (2 * context)) % moe.group(length) == 0

    def layouts(self, mesh: tuple[int, ...]) -> Iterator[Candidate]:
        """Yield all layouts on one mesh that recompute nothing; `remats` has the others.

        Those that differ in schedule only come one after the other.
        """
        replica, pipe, data, fsdp, expert, _, _ = mesh
        per_device = self.config.train.global_batch_size // (replica * data * fsdp * expert)
        kinds, zeros = self._kinds(mesh), (1, 2, 3) if fsdp > 1 else (self.config.sharding.zero,)
        for microbatches in self._microbatches(per_device, pipe):
            schedules = list(self._schedules(pipe, microbatches))
            for zero in zeros:
                for kind in kinds:
                    for schedule, chunks in schedules:
                        yield Candidate(mesh, microbatches, schedule, chunks, "none", (), zero, kind)

    def _microbatches(self, per_device: int, pipe: int) -> list[int]:
        """Return numbers of microbatches: all divisors of the sequences of a device, or some where those are many."""
        every = divisors(per_device)
        if len(every) <= MOST_MICROBATCHES:
            return every
        kept = {*_steps(every), *_steps([m for m in every if m % pipe == 0])}
        self.pruned["as many microbatches as another layout, but for a few"] += len(every) - len(kept)
        return sorted(kept)

    def remats(self, layout: Candidate) -> tuple[Candidate, ...]:
        """Return the layout under every other remat policy: each computes more than it, and so takes longer."""
        named = layout._replace(remat="named", remat_save=self.config.train.remat_save)
        return layout._replace(remat="dots"), named, layout._replace(remat="full")

    def leanest(self, mesh: tuple[int, ...]) -> Iterator[Candidate]:
        """Yield layouts of one mesh of which one holds least.

        They compute everything again, shard everything, and have the smallest microbatches, or a single one, which needs no sum
        of gradients beside its own.
        """
        replica, _, data, fsdp, expert, _, _ = mesh
        most = self.config.train.global_batch_size // (replica * data * fsdp * expert)
        zero = 3 if fsdp > 1 else self.config.sharding.zero
        for kind in self._kinds(mesh):
            for microbatches in sorted({1, most}):
                yield Candidate(mesh, microbatches, "1f1b", 1, "full", (), zero, kind)

    def _kinds(self, mesh: tuple[int, ...]) -> tuple[str, ...]:
        """Return the kinds of context attention to try."""
        asked, context, tensor = self.config.sharding.context_attention, mesh[5], mesh[6]
        model = self.config.model
        heads = math.gcd(model.num_heads, model.num_kv_heads) // tensor
        if asked != "auto" or context == 1:
            if asked == "ulysses" and heads % context:
                self.pruned["heads cannot be exchanged over so many devices (ulysses)"] += 1
                return ()
            return (asked,)
        return ("ring", "ulysses") if heads % context == 0 else ("ring",)

    def _schedules(self, pipe: int, microbatches: int) -> Iterator[tuple[str, int]]:
        """(schedule, chunks)"""
        layers, sync, period = self.config.model.stacked_layers, self.config.sync, len(self.config.model.kinds)

        def fits(parts: int) -> bool:
            is_whole = layers % (parts * sync.fragments) == 0 == layers % (parts * period)
            return sync.fragments == 1 or not sync.replicas_differ or is_whole

        if fits(pipe):
            yield "1f1b", 1
        if pipe == 1:
            return
        self.pruned["gpipe: 1f1b takes as long and holds less"] += 1
        if fits(pipe):
            yield from self._zero_bubble("zero_bubble", pipe, 1, microbatches)
        if fits(2 * pipe) and 2 * pipe <= self._groups():
            yield "v_shape", 2
            yield from self._zero_bubble("zero_bubble_v", pipe, 2, microbatches)
        if microbatches % pipe:
            self.pruned["interleaved: microbatches are not a multiple of the stages"] += 1
            return
        for chunks in useful_chunks(self._groups(), pipe):
            if fits(pipe * chunks):
                yield "interleaved", chunks
                yield from self._zero_bubble("zero_bubble", pipe, chunks, microbatches)

    def _zero_bubble(self, name: str, pipe: int, chunks: int, microbatches: int) -> Iterator[tuple[str, int]]:
        """(schedule, chunks) of weight gradients as passes of their own, where that shortens a step."""
        is_even = self.config.model.stacked_layers % (pipe * chunks * len(self.config.model.kinds)) == 0
        if is_even and 2 * (pipe - 1) <= microbatches <= MOST_FILLED * pipe and not self.config.lora.rank:
            yield name, chunks
        else:
            self.pruned[f"{name}: too few microbatches to fill waits, too many to wait, or nothing to put off"] += 1


def useful_chunks(layers: int, pipe: int) -> list[int]:
    """Return chunks, from 2 on, that cut a stage's groups of layers into halves, quarters, and so on."""
    found, size = [], math.ceil(layers / pipe)
    while size > 1:
        size = math.ceil(size / 2)
        chunks = math.ceil(layers / (pipe * size))
        if chunks > 1 and chunks not in found and pipe * chunks <= layers:
            found.append(chunks)
    return found


def _steps(numbers: list[int]) -> list[int]:
    """Drop of ascending numbers those less than half larger than the one before; the last is always kept."""
    kept: list[int] = []
    for number in numbers:
        if not kept or number >= 1.5 * kept[-1] or number == numbers[-1]:
            kept.append(number)
    return kept


def _cuts_heads(model: ModelConfig, tensor: int) -> bool:
    sizes = [model.num_heads, model.num_kv_heads, model.mlp_dim, model.padded_vocab_size]
    if model.moe:
        sizes.append(model.moe.mlp_dim)
    return all(size % tensor == 0 for size in sizes)


def _cuts_embed(model: ModelConfig, fsdp: int) -> bool:
    latent = model.latent_attention
    ranks = [rank for rank in (latent.query_rank, latent.kv_rank) if rank] if latent else []
    return all(size % fsdp == 0 for size in (model.embed_dim, *ranks))
