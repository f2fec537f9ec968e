"""Every rule about fields and their combinations, checked at once, before jax is imported.

Here: single values, the model, and the mesh. `run_rules.py` and `source_rules.py` hold the others.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxtrain.config import (
    FOLDED_SCHEDULES,
    MESH_AXES,
    NO_SETTINGS,
    VOCAB_MULTIPLE,
    Config,
    MeshConfig,
    ModelConfig,
    SyncConfig,
)
from jaxtrain.config.model_rules import setting_problems
from jaxtrain.config.run_rules import run_problems
from jaxtrain.config.stage_rules import stage_problems
from jaxtrain.config.stages import MOST_MICROBATCHES, Recipe
from jaxtrain.errors import ConfigError, nearest, violated
from jaxtrain.text import listed


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _or(numbers: Sequence[int]) -> str:
    return listed(numbers, "or")


def _nearest_multiples(number: int, unit: int) -> str:
    """Describe the multiples of `unit` next to `number`."""
    below, above = number // unit * unit, math.ceil(number / unit) * unit
    return _or([n for n in (below, above) if n > 0])


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> tuple[MeshConfig, list[str]]:
    """Fill in the axis that is -1, and list the mesh's problems.

    An axis of -1 becomes num_devices / the product of the others.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    problems = [
        f"mesh.{a}={n}: an axis has at least 1 device (or -1 for whatever is left)"
        for a, n in sizes.items()
        if n < 1 and n != -1
    ]
    free = [a for a, n in sizes.items() if n == -1]
    if len(free) > 1:
        problems.append(f"mesh: only one axis may be -1, but {' and '.join(free)} are; set all but one of them")
    if problems:
        return mesh, problems
    fixed = math.prod(n for n in sizes.values() if n != -1)
    words = " x ".join(f"{a}={n}" for a, n in sizes.items() if n not in (1, -1)) or "all axes 1"
    if free and num_devices % fixed:
        return mesh, [
            f"mesh: {words} uses {fixed} devices, which does not divide the {num_devices} present; "
            f"use a product of {_or(divisors(num_devices))}"
        ]
    if free:
        return dataclasses.replace(mesh, **{free[0]: num_devices // fixed}), []
    if fixed != num_devices:
        return mesh, [
            f"mesh: {words} is {fixed} device{'s' if fixed > 1 else ''}, but {num_devices} "
            f"{'are' if num_devices > 1 else 'is'} present; change an axis, set one to -1, or for fake CPU devices set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={fixed}"
        ]
    return mesh, []


_LARGEST = {
    "train.seed": 2**63,
    "train.stages.from_tokens": 2**63,
}  # limit of whole numbers; 2^31 for all others, so that products stay in bounds


def _type_problems(value: Any, path: str = "") -> list[str]:
    """Return the values whose type or choice is not the field's (a config file is Python, and may hold anything)."""
    hints = get_type_hints(type(value))
    names = [f.name for f in dataclasses.fields(value) if f.name not in NO_SETTINGS]
    return [problem for name in names for problem in _field_problems(getattr(value, name), hints[name], path + name)]


def _field_problems(value: Any, hint: Any, name: str) -> list[str]:
    """Return the `_type_problems` of one field."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return [] if value in arguments else [f"{name}={value!r}: {nearest(str(value), arguments)}"]
    if kind is UnionType:  # X | None
        return [] if value is None else _field_problems(value, arguments[0], name)
    if kind is tuple:
        if not isinstance(value, tuple):
            return [f"{name}={value!r} is not a tuple"]
        return [problem for i, item in enumerate(value) for problem in _field_problems(item, arguments[0], f"{name}.{i}")]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _type_problems(value, name + ".") if isinstance(value, hint) else [f"{name}={value!r} is not a {hint.__name__}"]
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        return [f"{name}={value!r} is not a whole number"]
    if hint is int and abs(value) >= (limit := _LARGEST.get(re.sub(r"\.[0-9]+", "", name), 2**31)):
        return [f"{name} is a whole number of {value.bit_length()} bits; the largest is {limit - 1}"]
    if hint is float and (not isinstance(value, (int, float)) or isinstance(value, bool)):
        return [f"{name}={value!r} is not a finite number"]
    if hint is float and not abs(value) <= sys.float_info.max:  # isfinite fails for whole numbers too large for a float
        return [
            f"{name}={value if isinstance(value, float) else 'a whole number too large for a float'} is not a finite number"
        ]
    if hint in (bool, str) and not isinstance(value, hint):
        return [f"{name}={value!r} is not a {hint.__name__}"]
    return []


_AT_LEAST_ONE = (
    "model.num_layers model.embed_dim model.num_heads model.num_kv_heads model.head_dim model.mlp_dim model.vocab_size "
    "pipeline.chunks data.sequence_length data.prefetch train.steps train.global_batch_size train.microbatches "
    "train.log_every train.loss_chunk checkpoint.keep sync.every sync.fragments sync.compression_block "
    "distributed.heartbeat_seconds distributed.start_timeout_seconds guard.rollback_batches"
).split()
_AT_LEAST_ZERO = (
    "data.workers optimizer.warmup_steps optimizer.weight_decay optimizer.clip_norm train.validate_every "
    "train.validate_batches train.stop_at_validation_loss train.z_loss train.sample_tokens train.tasks_every train.seed "
    "checkpoint.every checkpoint.keep_every checkpoint.keep_best checkpoint.fast_every model.sliding_window "
    "model.local_rope_theta model.learned_positions "
    "model.attention_scale model.attention_softcap model.logit_softcap lora.rank lora.alpha lora.base_group sync.delay "
    "sync.overlap distributed.processes guard.budget guard.copies_every guard.repeat_every "
    "distributed.hang_seconds distributed.phase_seconds"
).split()
_ABOVE_ZERO = (
    "model.rope_theta model.norm_epsilon model.init_std model.residual_scale model.embedding_scale model.logit_scale "
    "model.activation_limit optimizer.peak_lr optimizer.epsilon sync.outer_lr "
    "guard.spike_deviations"
).split()
_SHARES = "data.validation_fraction optimizer.final_lr_fraction optimizer.decay_fraction sync.mixing".split()
_DECAYS = "optimizer.beta1 optimizer.beta2 sync.outer_momentum train.ema_decay".split()
# Divisibility is only checked if these are in range.
_SIZES = ("model.", "pipeline.chunks", "data.sequence_length", "train.global_batch_size", "train.microbatches")


def _range_problems(config: Config, told: Sequence[str] = ()) -> list[str]:
    """Return the numbers out of range, except those that `told` reports already, and sections that are None."""

    def value(path: str) -> Any:
        section, name = path.split(".")
        return getattr(getattr(config, section), name, None)

    rules = [
        (_AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (_AT_LEAST_ZERO, lambda v: v >= 0, "must be 0 or more"),
        (_ABOVE_ZERO, lambda v: v > 0, "must be above 0"),
        (_SHARES, lambda v: 0 <= v <= 1, "is a share: 0 to 1"),
        (_DECAYS, lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    ]
    known = {re.split("[= ]", problem)[0] for problem in told}
    judged = [(p, holds, words) for paths, holds, words in rules for p in paths if not {p, p.partition(".")[0]} & known]
    return [f"{p}={value(p)} {words}" for p, holds, words in judged if not holds(value(p))]


def value_problems(config: Config) -> list[str]:
    """Return the problems of single fields, whatever the others and the devices are."""
    problems = _type_problems(config)
    return problems + _range_problems(config, problems)


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is not above `most`."""
    return max((d for d in divisors(max(number, 1)) if d <= most), default=1)


def _model_problems(model: ModelConfig, mesh: MeshConfig) -> list[str]:
    tensor, fsdp, vocabulary = max(mesh.tensor, 1), max(mesh.fsdp, 1), model.padded_vocab_size
    sizes = {f"model.{name}": getattr(model, name) for name in ("num_heads", "num_kv_heads", "mlp_dim")}
    if model.moe:
        sizes["model.moe.mlp_dim"] = model.moe.mlp_dim
    fits = _or([d for d in divisors(math.gcd(vocabulary, *sizes.values())) if d <= 64])
    return violated(
        {
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"use {_or(divisors(model.num_heads))}": model.num_heads % model.num_kv_heads,
            f"model.head_dim={model.head_dim} is odd, but RoPE turns pairs; use {model.head_dim + 1}": model.head_dim % 2,
            **{
                f"mesh.tensor={tensor} does not divide {name}={size}; use {fits}": size % tensor for name, size in sizes.items()
            },
            f"mesh.tensor={tensor} does not divide the padded vocabulary of {vocabulary} "
            f"(model.vocab_size={model.vocab_size} up to a multiple of {VOCAB_MULTIPLE}); use {fits}": vocabulary % tensor,
            f"mesh.fsdp={fsdp} does not divide model.embed_dim={model.embed_dim}, over which parameters are sharded; "
            f"use fsdp={_largest_divisor(model.embed_dim, fsdp)} and data for the rest, "
            f"or embed_dim={_nearest_multiples(model.embed_dim, fsdp)}": model.embed_dim % fsdp,
        }
    )


def _latent_attention_problems(model: ModelConfig, mesh: MeshConfig) -> list[str]:
    latent, fsdp = model.latent_attention, max(mesh.fsdp, 1)
    if latent is None:
        return []
    sizes = dataclasses.asdict(latent)
    return violated(
        {
            f"model.latent_attention gives every query head its own key, but model.num_kv_heads={model.num_kv_heads}; "
            f"use model.num_heads={model.num_heads}": model.num_kv_heads != model.num_heads,
            f"model.qk_norm={model.qk_norm}: latent attention norms its latents instead; use none": model.qk_norm != "none",
            f"model.latent_attention.query_rank={latent.query_rank} must be 0 or more": latent.query_rank < 0,
            **{
                f"model.latent_attention.{name}={sizes[name]} must be at least 1": sizes[name] < 1
                for name in ("kv_rank", "rope_dim", "value_dim")
            },
            **{
                f"mesh.fsdp={fsdp} does not divide model.latent_attention.{name}={sizes[name]}, over which the projections up "
                f"are sharded; use fsdp={_largest_divisor(sizes[name], fsdp)} and data for the rest": sizes[name] % fsdp
                for name in ("query_rank", "kv_rank")
                if sizes[name] > 0
            },
            f"model.latent_attention.rope_dim={latent.rope_dim} is odd, but RoPE turns pairs": latent.rope_dim % 2,
        }
    )


def _moe_problems(config: Config, mesh: MeshConfig) -> list[str]:
    moe, layers, length = config.model.moe, config.model.num_layers, config.data.sequence_length
    if moe is None:
        return []
    at_least = {"num_experts": 1, "experts_per_token": 1, "mlp_dim": 1, "groups": 1, "groups_per_token": 1}
    at_least |= dict.fromkeys(("shared_experts", "first_dense_layers", "capacity_group"), 0)
    at_least |= dict.fromkeys(("balance_loss", "router_z_loss", "bias_update_rate"), 0)
    values = {name: getattr(moe, name) for name in at_least}
    if wrong := violated({f"model.moe.{n}={v} must be at least {at_least[n]}": v < at_least[n] for n, v in values.items()}):
        return wrong
    open_experts = moe.num_experts // moe.groups * min(moe.groups_per_token, moe.groups)
    is_uneven, has_few_groups = moe.num_experts % moe.groups > 0, moe.groups_per_token > moe.groups
    group, piece = moe.group(length), length if mesh.context == 1 else length // (2 * mesh.context)
    return violated(
        {
            f"model.moe.groups={moe.groups} does not divide num_experts={moe.num_experts}; "
            f"use {_or(divisors(moe.num_experts))}": is_uneven,
            f"model.moe.groups_per_token={moe.groups_per_token} is more than groups={moe.groups}": (
                has_few_groups and not is_uneven
            ),
            f"model.moe.experts_per_token={moe.experts_per_token} is more than the {open_experts} experts to choose from": (
                moe.experts_per_token > open_experts and not is_uneven and not has_few_groups
            ),
            f"model.moe.first_dense_layers={moe.first_dense_layers} leaves none of the {layers} layers; "
            "use fewer": moe.first_dense_layers >= layers,
            f"mesh.expert={mesh.expert} does not divide model.moe.num_experts={moe.num_experts}; "
            f"use {_or([d for d in divisors(moe.num_experts) if d <= 64])}": moe.num_experts % mesh.expert,
            f"model.moe: weight_scale={moe.weight_scale} and capacity_factor={moe.capacity_factor} must be above 0": (
                moe.weight_scale <= 0 or moe.capacity_factor <= 0
            ),
            f"model.moe.exchange_factor={moe.exchange_factor} with dispatch={moe.dispatch}: dropless takes 0 (room for all "
            "rows) or at least 1; capacity has capacity_factor": moe.exchange_factor
            and (moe.exchange_factor < 1 or moe.dispatch != "dropless"),
            f"model.moe.capacity_group={moe.capacity_group}: groups of {group} tokens must fit whole into the {piece} "
            f"consecutive tokens that a device holds with mesh.context={mesh.context}; "
            f"use {_or(divisors(piece)[-3:])}": moe.dispatch == "capacity" and piece % group,
        }
    )


def _context_problems(config: Config, mesh: MeshConfig) -> list[str]:
    length, context, model = config.data.sequence_length, mesh.context, config.model
    pieces = 2 * context if context > 1 else 1
    unit = math.lcm(pieces, context * mesh.tensor)
    heads = math.gcd(model.num_heads, model.num_kv_heads) // mesh.tensor
    return violated(
        {
            f"data.sequence_length={length} is not a multiple of {unit}: with mesh.context={context} the sequence is cut into "
            f"{pieces} pieces, and with mesh.tensor={mesh.tensor} sharded between blocks too; "
            f"use {_nearest_multiples(length, unit)}": length % unit,
            f"sharding.context_attention=ulysses exchanges heads, but mesh.context={context} does not divide the {heads} "
            f"kv heads that mesh.tensor={mesh.tensor} leaves a device; use context={_or(divisors(heads))}, ring or "
            "gather": config.sharding.context_attention == "ulysses" and heads % context,
        }
    )


def _layout_problems(config: Config, mesh: MeshConfig) -> list[str]:
    train, pipeline, layers = config.train, config.pipeline, config.model.stacked_layers
    schedule, chunks, pipe, kinds = pipeline.schedule, pipeline.chunks, mesh.pipe, len(config.model.kinds)
    unit = mesh.batch_shards * train.microbatches
    parts, groups = pipe * chunks, math.ceil(layers / kinds)
    whole = f" (groups of {kinds} layers, of model.pattern, are not cut)" if config.model.pattern else ""
    is_folded, is_plain = schedule in FOLDED_SCHEDULES, schedule in ("gpipe", "1f1b")
    rules = {
        f"train.global_batch_size={train.global_batch_size} is not a multiple of replica x data x fsdp x expert x "
        f"microbatches = {mesh.replica} x {mesh.data} x {mesh.fsdp} x {mesh.expert} x {train.microbatches} = {unit}; "
        f"use {_nearest_multiples(train.global_batch_size, unit)}": train.global_batch_size % unit,
        f"train.microbatches={train.microbatches} are too many for the table of a step; "
        f"use at most {MOST_MICROBATCHES}": train.microbatches > MOST_MICROBATCHES,
        f"pipeline.schedule={schedule} folds two chunks of layers over the stages, but pipeline.chunks={chunks} and "
        f"mesh.pipe={pipe}; use chunks=2 and pipe of 2 or more, or another schedule": is_folded and (pipe == 1 or chunks != 2),
        f"pipeline.chunks={chunks} needs pipeline.schedule=interleaved or zero_bubble, not {schedule}": chunks > 1 and is_plain,
        f"pipeline.chunks={chunks} needs mesh.pipe above 1; with one stage use chunks=1": chunks > 1
        and pipe == 1
        and not (is_folded or is_plain),
        f"mesh.pipe={pipe} x pipeline.chunks={chunks} cuts {layers} layers into {parts} parts, "
        f"some without a layer{whole}; use at most {groups} parts": parts > groups > 0,
        f"train.layer_inputs_memory=host does not go with mesh.pipe={pipe}, tensor={mesh.tensor} and expert={mesh.expert}: "
        "slots of a pipeline, and layers that share an iteration, are joined on the device; use device, or 1 for "
        "each": train.layer_inputs_memory == "host" and max(pipe, mesh.tensor, mesh.expert) > 1,
        f"sync.mode={config.sync.mode} rounds the mean of the replicas' parameters at every exchange, which loses what is "
        "small with model.param_dtype=bfloat16; use float32, or sync.mode=every_step or delayed": config.sync.replicas_differ
        and config.model.param_dtype == "bfloat16",
    }
    problems = violated(rules) + _sync_problems(config.sync, mesh, config.model, parts)
    return problems + _moe_problems(config, mesh) + _context_problems(config, mesh)


def _sync_problems(sync: SyncConfig, mesh: MeshConfig, model: ModelConfig, parts: int) -> list[str]:
    """Return the problems of `sync` for the model's stack cut into `parts`."""
    if not sync.replicas_differ:
        return []
    layers, is_whole = model.stacked_layers, model.stacked_layers % (parts * len(model.kinds)) == 0
    fits = [n for n in divisors(max(layers, 1)) if layers % (parts * n) == 0 and is_whole] or [1]
    return violated(
        {
            f"sync.mode={sync.mode} keeps replicas together, but mesh.replica=1; use 2 or more, or "
            "mode=every_step": mesh.replica == 1,
            f"sync.fragments={sync.fragments}: the {layers} layers of the stack do not make up {sync.fragments} fragments in "
            f"each of {parts} parts (mesh.pipe x pipeline.chunks); use {_or(fits)}": sync.fragments > 1
            and (layers % (parts * sync.fragments) or not is_whole),
            f"sync.fragments={sync.fragments}: at most one begins in a step, so use at most "
            f"sync.every={sync.every}": sync.fragments > sync.every,
            f"sync.overlap={sync.overlap} must be below sync.every={sync.every}": sync.overlap >= sync.every,
        }
    )


def find_problems(config: Config, num_devices: int) -> tuple[Config, list[str]]:
    """Return the config with its mesh resolved for `num_devices`, and all its problems, one line each."""
    if _type_problems(config):  # the rules below compute with the values and need right types
        return config, value_problems(config)
    range_problems = _range_problems(config)
    mesh, mesh_problems = resolve_mesh(config.mesh, num_devices)
    config = dataclasses.replace(config, mesh=mesh)
    problems = range_problems + mesh_problems + _size_problems(config, range_problems, mesh_problems) + run_problems(config)
    table_problems = [] if range_problems else stage_problems(config)
    if config.train.stages and not range_problems and not table_problems:
        for stage in Recipe(config).all:
            more = [each for each in _size_problems(stage.config, [], mesh_problems) if each not in problems]
            table_problems += [f"train.stages, stage {stage.name}: {each}" for each in more]
    return config, problems + table_problems


def _size_problems(config: Config, range_problems: list[str], mesh_problems: list[str]) -> list[str]:
    """Return the problems of the model, its batch and its layout, where sizes and mesh are in order."""
    if any(problem.startswith(_SIZES) for problem in range_problems):
        return []
    problems = _model_problems(config.model, config.mesh) + _latent_attention_problems(config.model, config.mesh)
    problems += setting_problems(config.model, config.data.sequence_length)
    return problems if mesh_problems else problems + _layout_problems(config, config.mesh)


def validate(config: Config, num_devices: int) -> Config:
    """Return the config with its mesh resolved for `num_devices`.

    Raises:
      ConfigError: with all the problems at once, each with its numbers and the nearest values that work.
    """
    resolved, problems = find_problems(config, num_devices)
    if problems:
        raise ConfigError(problems)
    return resolved
