"""Rules for the fields that say how to run: data, checkpoints, guards, telemetry, compiler options."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

from jaxtrain.config import REMAT_NAMES, Config
from jaxtrain.config.objective_rules import objective_problems
from jaxtrain.config.source_rules import remote_problems, source_problems, tokenizer_problems
from jaxtrain.config.validation_rules import validation_problems
from jaxtrain.errors import ExplainedError, nearest, violated
from jaxtrain.hardware import load_chip

RESUME_MODES = ("auto", "never", "required")
_MOST_THREADS = 1024
_LONGEST_SPIKE_WINDOW = 2**20


def run_problems(config: Config) -> list[str]:
    """Return the problems of the fields that say how to run, whatever the model and the mesh are."""
    problems = []
    unknown = [name for name in config.train.remat_save if name not in REMAT_NAMES]
    problems += [f"train.remat_save has {name!r}: {nearest(name, REMAT_NAMES)}" for name in unknown]
    problems += [f"data.store_cache_gib={config.data.store_cache_gib} must be at least 0"] * (config.data.store_cache_gib < 0)
    if config.data.workers > _MOST_THREADS:
        problems.append(f"data.workers={config.data.workers} threads are too many for a process; use {_MOST_THREADS} or fewer")
    problems += _data_problems(config)
    problems += tokenizer_problems(config.data.tokenizer, config.model.vocab_size)
    if "://" in config.run_dir:
        problems.append(
            f"run_dir={config.run_dir!r}: a run writes into a folder of a file system that all hosts share, with locks and "
            "appends, which object stores do not have; give a folder, and --checkpoint.mirror for copies of its checkpoints"
        )
    if config.checkpoint.mirror and "://" not in config.checkpoint.mirror:
        problems.append(f"checkpoint.mirror={config.checkpoint.mirror!r}: give a URL, e.g. s3://bucket/run")
    if config.checkpoint.mirror and not config.checkpoint.every:
        problems.append("checkpoint.mirror needs checkpoints to copy: give --checkpoint.every=1000 or so too")
    if config.checkpoint.export_hf and not config.checkpoint.every:
        problems.append("checkpoint.export_hf exports the last checkpoint: give --checkpoint.every=1000 or so too")
    if config.init_from_optimizer and not config.init_from:
        problems.append("init_from_optimizer needs the run that it is taken from: give --init_from=RUN too")
    problems += _moments_problems(config)
    if config.checkpoint.fast_every and not config.checkpoint.every:
        problems.append("checkpoint.fast_every needs checkpoints that last: give --checkpoint.every=1000 or so too")
    if "://" in config.checkpoint.fast_dir:
        problems.append(f"checkpoint.fast_dir={config.checkpoint.fast_dir!r}: give a folder of the host's own, e.g. /dev/shm")
    problems += validation_problems(config)
    problems += _idle_problems(config) + _guard_problems(config) + _float8_problems(config) + objective_problems(config)
    problems += _lora_problems(config)
    if config.telemetry.hardware != "auto":
        problems += _explained(lambda: load_chip(config.telemetry.hardware, "telemetry.hardware"))
    for option in config.train.xla_options:
        problems += _explained(functools.partial(parse_xla_option, option))
        if config.train.deterministic and re.match(r"\s*xla_gpu_\w*determinis|\s*xla_gpu_autotune_level", option):
            problems.append(f"train.xla_options: {option!r} does not go with train.deterministic, which sets that itself")
    if not re.fullmatch(r"(?!\.+$)[\w.+-]+", config.name):  # nor .., which would lead out of runs/
        problems.append(f"name={config.name!r}: use letters, digits and . _ + - only, and not dots alone")
    return problems


def _moments_problems(config: Config) -> list[str]:
    rule, sync = config.optimizer, config.sync
    on_host = rule.moments_memory == "host"
    if config.parts.optimizer is not None:
        set_here = {f"moments_dtype={rule.moments_dtype}": rule.moments_dtype == "int8", "moments_memory=host": on_host}
        words = "is for the rules of optimizer.name; a plugged optimizer keeps its own moments, in float32 on the device"
        return violated({f"optimizer.{field} {words}": is_set for field, is_set in set_here.items()})
    return violated(
        {
            "optimizer.moments_dtype=int8: adafactor holds no moments of a matrix's size; use float32, or adamw": (
                rule.moments_dtype == "int8" and rule.name == "adafactor"
            ),
            "optimizer.moments_memory=host: adafactor holds no moments of a matrix's size; use device, or adamw, lion or sgd": (
                on_host and rule.name == "adafactor"
            ),
            "optimizer.moments_memory=host: muon needs the moments of all layers at once; use device, or adamw, lion or sgd": (
                on_host and rule.name == "muon"
            ),
            f"optimizer.moments_memory=host does not go with sync.mode={sync.mode}, which keeps moments of each replica: "
            "use device, or sync.mode=every_step": on_host and sync.replicas_differ,
        }
    )


def _data_problems(config: Config) -> list[str]:
    problems = []
    if not config.data.sources:
        problems.append("data.sources is empty; give at least one source")
    for i, source in enumerate(config.data.sources):
        if source.weight < 0 or (source.weight == 0 and not any(stage.weights for stage in config.train.stages)):
            problems.append(f"data.sources.{i}.weight={source.weight} must be above 0; leave the source out instead")
        if source.order == "files" and (source.kind == "chat" or config.data.packing == "best_fit"):
            problems.append(f"data.sources.{i}.order=files: its rows are packed by length, in no order; use shuffled")
        problems += source_problems(f"data.sources.{i}.", source, config.model.vocab_size)
    for field in ("tokenizer", "chat_template", "cache_dir"):
        problems += remote_problems(f"data.{field}", getattr(config.data, field))
    if not config.data.mask_documents and any(source.kind == "chat" for source in config.data.sources):
        problems.append("data.mask_documents=False: samples of kind=chat are packed, and must not see one another; use True")
    if config.data.packing == "best_fit" and not config.data.mask_documents:
        problems.append("data.packing=best_fit packs documents, which must not see one another; use data.mask_documents=True")
    return problems


def _lora_problems(config: Config) -> list[str]:
    problems = []
    unused = [
        name
        for name in ("alpha", "targets", "rank_stabilised", "init_from", "base", "base_group")
        if getattr(config.lora, name)
    ]
    if unused and not config.lora.rank:
        problems.append(f"lora.{unused[0]} is of adapters, but lora.rank=0 makes none: give --lora.rank=16 or so too")
    if config.lora.base_group and not config.lora.base:
        problems.append(f"lora.base_group={config.lora.base_group} is of a base in few bits: give --lora.base=nf4 or so too")
    if config.lora.base_group % 2 and config.lora.base == "nf4":
        problems.append(f"lora.base_group={config.lora.base_group}: nf4 packs pairs of numbers; use an even number")
    if config.lora.init_from and not config.init_from:
        problems.append("lora.init_from is an adapter of given weights: give --init_from=FOLDER too")
    return problems


def _float8_problems(config: Config) -> list[str]:
    if config.model.matmul_dtype != "float8":
        return []
    own = [f"model.parts.{name}" for name in ("attention", "mlp", "layer") if getattr(config.model.parts, name) is not None]
    taken = ["lora.rank"] * (config.lora.rank > 0) + own
    return [
        f"model.matmul_dtype=float8 is of the decoder's own weights, all trained: with {name} use default" for name in taken
    ]


def _idle_problems(config: Config) -> list[str]:
    """Return the requests that could never take effect in this run."""
    problems, checkpoint, guard, train = [], config.checkpoint, config.guard, config.train
    profile, steps = config.telemetry.profile, train.steps
    window = re.fullmatch(r"(\d{1,18}):(\d{1,18})", profile)
    if profile and (window is None or int(window[1]) > int(window[2])):
        problems.append(f"telemetry.profile={profile!r}: give FIRST:LAST step, e.g. 10:13")
    elif window and not 1 <= int(window[1]) <= int(window[2]) <= steps:
        problems.append(f"telemetry.profile={profile!r} is not within the run, whose steps are 1 to train.steps={steps}")
    if config.telemetry.prometheus and not config.telemetry.prometheus.endswith(".prom"):
        problems.append(
            f"telemetry.prometheus={config.telemetry.prometheus}: node_exporter reads files that end in .prom alone"
        )
    resume = checkpoint.resume
    if resume not in RESUME_MODES and not resume.isdecimal() and not re.fullmatch(r".+@(\d{1,18}|best)", resume):
        problems.append(f"checkpoint.resume={resume!r}: {nearest(resume, (*RESUME_MODES, 'STEP', 'RUN@STEP'))}")
    elif resume not in ("auto", "never") and not checkpoint.every:
        problems.append(
            f"checkpoint.resume={resume} goes on from a checkpoint, but with checkpoint.every=0 none is read or written"
        )
    for name in ("keep_every", "keep_best"):
        if getattr(checkpoint, name) and not checkpoint.every:
            problems.append(
                f"checkpoint.{name}={getattr(checkpoint, name)} keeps checkpoints, but checkpoint.every=0 makes none"
            )
    if checkpoint.keep_best and checkpoint.every and not _some_saved_validated(config):
        problems.append(
            f"checkpoint.keep_best={checkpoint.keep_best} needs checkpoints saved in steps that validate, of which "
            f"checkpoint.every={checkpoint.every} and train.validate_every={train.validate_every} give none before the last; "
            f"use --train.validate_every={checkpoint.every}"
        )
    if train.stop_at_validation_loss and not train.validate_every:
        problems.append(
            f"train.stop_at_validation_loss={train.stop_at_validation_loss} needs validations, but train.validate_every=0; "
            "use --train.validate_every=100 or so"
        )
    if guard.copies_every and guard.copies == "off":
        problems.append(f"guard.copies_every={guard.copies_every} compares copies, but guard.copies=off; use stop or rollback")
    return problems


def _some_saved_validated(config: Config) -> bool:
    """Return whether a step before the last is both validated and saved."""
    every = config.train.validate_every
    return every > 0 and math.lcm(config.checkpoint.every, every) < config.train.steps


def _guard_problems(config: Config) -> list[str]:
    guard, sync = config.guard, config.sync
    problems = []
    if guard.classifies_steps and (sync.replicas_differ or sync.queued):
        why = (
            "each replica has parameters and losses of its own, and what one of them skips the others do not"
            if sync.replicas_differ
            else f"a gradient is applied {sync.queued} steps after its loss is known"
        )
        problems.append(
            f"sync.mode={sync.mode}: {why}; use guard.non_finite=stop (or off), guard.spike=off and guard.debug_nans=False, "
            "or sync.mode=every_step"
        )
    if guard.non_finite == "off" and guard.classifies_steps:
        problems.append("guard.non_finite=off leaves NaNs to guard.spike and guard.debug_nans; use stop, skip or rollback")
    if guard.classifies_steps and guard.spike_window > _LONGEST_SPIKE_WINDOW:
        problems.append(
            f"guard.spike_window={guard.spike_window}: every device keeps the window; use {_LONGEST_SPIKE_WINDOW} or less"
        )
    if guard.spike != "off" and guard.spike_window < 8:
        problems.append(f"guard.spike_window={guard.spike_window} is too short for a median absolute deviation; use 8 or more")
    for name in ("non_finite", "spike", "copies"):
        if getattr(guard, name) == "rollback" and not config.checkpoint.every:
            problems.append(f"guard.{name}=rollback goes back to a checkpoint, but checkpoint.every=0 makes none")
    return problems


def _explained(check: Callable[[], object]) -> list[str]:
    """Return the error that a check raises as a problem."""
    try:
        check()
    except ExplainedError as error:
        return [str(error)]
    return []


def parse_xla_option(option: str) -> tuple[str, bool | int | str]:
    """(name, value) of an entry of `train.xla_options`, "name=value": true, false and whole numbers as such.

    Raises:
      ExplainedError: there is no name or no value.
    """
    name, equals, text = (part.strip() for part in option.partition("="))
    if not (name and equals and text):
        raise ExplainedError(f"train.xla_options: {option!r} is not name=value, e.g. xla_gpu_enable_pipelined_all_gather=false")
    if text.lower() in ("true", "false"):
        return name, text.lower() == "true"
    return name, int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
