"""The configuration: nested dataclasses, one meaning a field, and one `validate` that finds every problem at once.

Imports neither jax nor anything else that is slow, so that a typo is answered in a moment. Every field is a typed
command-line flag (`--mesh.fsdp=8`), and the string below a field is its help text.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxtrain.errors import ConfigError, ExplainedError, nearest
from jaxtrain.hardware import find_chip

MESH_AXES = ("replica", "pipe", "data", "fsdp", "expert", "context", "tensor")
UNBUILT_AXES = ("replica", "expert", "context")
VOCAB_MULTIPLE = 128
REMAT_NAMES = ("query", "key", "value", "attention", "attention_out", "mlp_gate", "mlp_up", "mlp_hidden", "mlp_out")

DType = Literal["float32", "bfloat16"]
AttentionBackend = Literal["auto", "reference", "blockwise", "cudnn"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved"]
RematPolicy = Literal["none", "dots", "named", "full"]
SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "tokens", "array_record", "synthetic"]
OptimizerName = Literal["adamw", "sgd", "adafactor", "lion", "muon"]
LearningRateSchedule = Literal["constant", "cosine", "warmup_stable_decay", "inverse_sqrt"]
ResumeMode = Literal["auto", "never", "required"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretching of the RoPE wavelengths beyond the length that the model was first trained on."""

    factor: float = 8.0
    """How many times longer the context becomes; wavelengths beyond the old context are stretched by it."""
    low_frequency_factor: float = 1.0
    """Wavelengths above original_length / this are stretched fully."""
    high_frequency_factor: float = 4.0
    """Wavelengths below original_length / this are left as they are."""
    original_length: int = 8192
    """The context, in tokens, that the unstretched model was trained on."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: causal grouped-query attention softmax(QK^T/sqrt(d_k))V with RoPE, RMSNorm and SwiGLU."""

    num_layers: int = 4
    """Decoder layers."""
    embed_dim: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads; must divide num_heads (grouped-query attention)."""
    head_dim: int = 64
    """Width of one head, d_k of the attention formula; even, for RoPE."""
    mlp_dim: int = 1024
    """Hidden width of the SwiGLU block."""
    vocab_size: int = 257
    """Number of token ids. Stored padded up to a multiple of 128; the padding is masked in the loss, never exported."""
    rope_theta: float = 10_000.0
    """Base of the RoPE wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama-3.1's wavelength stretching; None for plain RoPE."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection too."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE."""
    dtype: DType = "bfloat16"
    """Compute dtype of matmuls and activations; softmax, norms and the loss are always float32."""
    param_dtype: DType = "float32"
    """Dtype in which parameters are kept and updated."""
    attention: AttentionBackend = "auto"
    """Attention backend; auto takes the fastest that the device and the mask allow, and the log says which."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get it over sqrt(2 num_layers)."""

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128: the same on every mesh, so that the parameters are too."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. The product must equal the number of devices; one axis may be -1 (whatever is left)."""

    replica: int = 1
    """Whole training replicas on slow links (not built yet: 1)."""
    pipe: int = 1
    """Pipeline stages: layers are cut into stages."""
    data: int = 1
    """Data parallelism with replicated parameters."""
    fsdp: int = -1
    """Data parallelism with sharded parameters, gradients and optimizer state."""
    expert: int = 1
    """Expert parallelism (not built yet: 1)."""
    context: int = 1
    """Sequence sharding inside attention (not built yet: 1)."""
    tensor: int = 1
    """Tensor parallelism over heads, MLP width and vocabulary, with the sequence sharded between blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of MESH_AXES."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def batch_shards(self) -> int:
        """Into how many parts the global batch is cut."""
        return self.replica * self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class PipelineConfig:
    """How the work of the pipeline stages is ordered in time."""

    schedule: ScheduleName = "1f1b"
    """Order of forward and backward work over the stages."""
    chunks: int = 1
    """Parts of the layer stack that each stage holds; more than 1 needs schedule=interleaved."""


@dataclass(frozen=True)
class DataSource:
    """One source of documents."""

    kind: SourceKind = "stdlib"
    """stdlib: the running Python's own source code. text: files. jsonl, parquet: one document a row. tokens: .bin or .npy
    made by `python -m jaxtrain.tokenize`. array_record: one UTF-8 document a record. synthetic: random tokens."""
    path: str = ""
    """Files to read, as a glob ("books/**/*.txt"); several globs are separated by commas."""
    text_field: str = "text"
    """Which field of a JSONL or Parquet row holds the text."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the other sources."""


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on. Batch n is a pure function of the data, train.seed and n."""

    sources: tuple[DataSource, ...] = (DataSource(),)
    """The mixture; flags are --data.sources.0.kind and so on."""
    tokenizer: str = "byte"
    """byte; bpe:SIZE (a byte-level BPE trained on the data at first use); a tokenizer.json; a SentencePiece .model; or none,
    where every source is token ids already."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    mask_documents: bool = True
    """Keep attention inside a document, and restart positions with it, where several are packed into a sequence."""
    validation_fraction: float = 0.05
    """Share of the files (of the documents, where rows are in few files; of the lines, in a lone text file) held out."""
    prefetch: int = 4
    """Batches made ready ahead of the step."""
    workers: int = 0
    """Threads that read ahead; 0 reads in the loop's own prefetch thread."""
    cache_dir: str = "~/.cache/jaxtrain/data"
    """Where tokenized text and trained tokenizers are kept between runs."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate over time."""

    name: OptimizerName = "adamw"
    """The update rule."""
    peak_lr: float = 3e-4
    """Largest learning rate."""
    schedule: LearningRateSchedule = "cosine"
    """Learning rate over steps, after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """warmup_stable_decay only: the last share of the steps over which the rate falls."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step as a share of the peak (cosine, warmup_stable_decay)."""
    beta1: float = 0.9
    """Decay of the first moment (adamw, lion, muon), or momentum (sgd: 0 is plain theta - alpha * gradient)."""
    beta2: float = 0.95
    """Decay of the second moment (adamw, lion)."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only: no norms, no biases."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how exact."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    seed: int = 0
    """Seed of the initial parameters and of the data order."""
    global_batch_size: int = 32
    """Sequences per step over all devices."""
    microbatches: int = 1
    """Parts into which a step's batch is cut (gradient accumulation; with a pipeline, what fills it)."""
    log_every: int = 10
    """Steps between two logged rows."""
    validate_every: int = 100
    """Steps between two validations; 0 for none. The last step always validates unless it is 0."""
    validate_batches: int = 0
    """Batches of global_batch_size in a validation; 0 for all the held-out data."""
    stop_at_validation_loss: float = 0.0
    """Stop when the validation loss (nats a token) reaches this; 0 for never."""
    remat: RematPolicy = "full"
    """What the backward pass recomputes. none: nothing; dots: all but matmuls; named: all but remat_save; full: each layer."""
    remat_save: tuple[str, ...] = ("attention",)
    """remat=named only: activations that are kept."""
    reduce_dtype: DType = "float32"
    """Dtype in which gradients are summed over devices."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, which keeps logits from drifting; 0 for none."""
    loss_chunk: int = 512
    """Tokens of a sequence whose logits exist at one time."""
    sample_tokens: int = 0
    """Tokens to sample from the trained model at the end of the run, from held-out text; 0 for none."""
    compilation_cache: str = "~/.cache/jaxtrain/compilation"
    """Folder of the persistent compilation cache; empty for none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 1000
    """Steps between two checkpoints; the last step is always saved. 0 saves nothing at all."""
    keep: int = 3
    """How many of the newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 for none."""
    resume: ResumeMode = "auto"
    """auto: go on from the newest checkpoint in run_dir, if any; never: refuse a run_dir that has some; required: need one."""
    asynchronous: bool = True
    """Write while training goes on."""


@dataclass(frozen=True)
class TelemetryConfig:
    """What a run tells."""

    wandb_project: str = ""
    """Weights & Biases project; empty for none. The key comes from the environment."""
    profile: str = ""
    """Steps to trace as FIRST:LAST, e.g. 10:13 (XProf and Perfetto, in run_dir/profile); empty for none."""
    hardware: str = "auto"
    """Chip whose peak FLOP/s the MFU is measured against; auto asks the device."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    name: str = "run"
    """Name of the run."""
    run_dir: str = ""
    """Where everything the run writes goes; empty for runs/NAME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def directory(self) -> Path:
        """run_dir, or runs/NAME where none is given."""
        return Path(self.run_dir).expanduser() if self.run_dir else Path("runs") / self.name


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _or(numbers: Sequence[int]) -> str:
    """ "1, 2 or 4" """
    shown = [str(n) for n in numbers]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` next to `number`, as words."""
    below, above = number // unit * unit, math.ceil(number / unit) * unit
    return _or([n for n in (below, above) if n > 0])


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> tuple[MeshConfig, list[str]]:
    """Fills in the axis that is -1, and lists what is wrong with the mesh.

    An axis of -1 becomes num_devices over the product of the others.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    problems = [
        f"mesh.{a}={n}: an axis has at least 1 device (or -1 for whatever is left)"
        for a, n in sizes.items()
        if n < 1 and n != -1
    ]
    problems += [f"mesh.{a}={sizes[a]}: the {a} axis is not built yet; use 1" for a in UNBUILT_AXES if sizes[a] not in (1, -1)]
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
        if free[0] in UNBUILT_AXES and num_devices != fixed:
            return mesh, [f"mesh.{free[0]}=-1 would become {num_devices // fixed}, but that axis is not built yet; use 1"]
        return dataclasses.replace(mesh, **{free[0]: num_devices // fixed}), []
    if fixed != num_devices:
        return mesh, [
            f"mesh: {words} is {fixed} device{'s' if fixed > 1 else ''}, but {num_devices} "
            f"{'are' if num_devices > 1 else 'is'} present; change an axis, set one to -1, or for fake CPU devices set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={fixed}"
        ]
    return mesh, []


def _type_problems(value: Any, path: str = "") -> list[str]:
    """Values whose type or choice is not what the field declares (a config file is Python, and may hold anything)."""
    hints = get_type_hints(type(value))
    names = [f.name for f in dataclasses.fields(value)]
    return [problem for name in names for problem in _field_problems(getattr(value, name), hints[name], path + name)]


def _field_problems(value: Any, hint: Any, name: str) -> list[str]:
    """`_type_problems` of one field."""
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
        return _type_problems(value, name + ".") if type(value) is hint else [f"{name}={value!r} is not a {hint.__name__}"]
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        return [f"{name}={value!r} is not a whole number"]
    if hint is float and (not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value)):
        return [f"{name}={value!r} is not a finite number"]
    if hint in (bool, str) and not isinstance(value, hint):
        return [f"{name}={value!r} is not a {hint.__name__}"]
    return []


_AT_LEAST_ONE = (
    "model.num_layers model.embed_dim model.num_heads model.num_kv_heads model.head_dim model.mlp_dim model.vocab_size "
    "pipeline.chunks data.sequence_length data.prefetch train.steps train.global_batch_size train.microbatches "
    "train.log_every train.loss_chunk checkpoint.keep"
).split()
_AT_LEAST_ZERO = (
    "data.workers optimizer.warmup_steps optimizer.weight_decay optimizer.clip_norm train.validate_every "
    "train.validate_batches train.stop_at_validation_loss train.z_loss train.sample_tokens train.seed checkpoint.every "
    "checkpoint.keep_every"
).split()
_ABOVE_ZERO = "model.rope_theta model.norm_epsilon model.init_std optimizer.peak_lr optimizer.epsilon".split()
_SHARES = "data.validation_fraction optimizer.final_lr_fraction optimizer.decay_fraction".split()
_DECAYS = "optimizer.beta1 optimizer.beta2".split()
# Divisibility is only judged where these are in range.
_SIZES = ("model.", "pipeline.chunks", "data.sequence_length", "train.global_batch_size", "train.microbatches")


def _range_problems(config: Config) -> list[str]:
    def value(path: str) -> float:
        section, name = path.split(".")
        return getattr(getattr(config, section), name)

    rules = [
        (_AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (_AT_LEAST_ZERO, lambda v: v >= 0, "must be 0 or more"),
        (_ABOVE_ZERO, lambda v: v > 0, "must be above 0"),
        (_SHARES, lambda v: 0 <= v <= 1, "is a share: 0 to 1"),
        (_DECAYS, lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    ]
    return [f"{p}={value(p)} {words}" for paths, holds, words in rules for p in paths if not holds(value(p))]


def _model_problems(model: ModelConfig, mesh: MeshConfig) -> list[str]:
    problems = []
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"use {_or(divisors(model.num_heads))}"
        )
    if model.head_dim % 2:
        problems.append(f"model.head_dim={model.head_dim} is odd, but RoPE turns pairs; use {model.head_dim + 1}")
    tensor, fsdp = mesh.tensor, mesh.fsdp
    cut = math.gcd(model.num_heads, model.num_kv_heads, model.mlp_dim, model.padded_vocab_size)
    fits = _or([d for d in divisors(cut) if d <= 64])
    for name in ("num_heads", "num_kv_heads", "mlp_dim"):
        size = getattr(model, name)
        if tensor > 0 and size % tensor:
            problems.append(f"mesh.tensor={tensor} does not divide model.{name}={size}; use {fits}")
    if tensor > 0 and model.padded_vocab_size % tensor:
        problems.append(
            f"mesh.tensor={tensor} does not divide the padded vocabulary of {model.padded_vocab_size} "
            f"(model.vocab_size={model.vocab_size} up to a multiple of {VOCAB_MULTIPLE}); use {fits}"
        )
    if fsdp > 0 and model.embed_dim % fsdp:
        problems.append(
            f"mesh.fsdp={fsdp} does not divide model.embed_dim={model.embed_dim}, over which parameters are sharded; "
            f"use fsdp={max(d for d in divisors(model.embed_dim) if d <= fsdp)} and data for the rest, "
            f"or embed_dim={_nearest_multiples(model.embed_dim, fsdp)}"
        )
    return problems


def _layout_problems(config: Config, mesh: MeshConfig) -> list[str]:
    train, pipeline, layers = config.train, config.pipeline, config.model.num_layers
    problems = []
    unit = mesh.batch_shards * train.microbatches
    if train.global_batch_size % unit:
        problems.append(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of data x fsdp x expert x microbatches = "
            f"{mesh.data} x {mesh.fsdp} x {mesh.expert} x {train.microbatches} = {unit}; "
            f"use {_nearest_multiples(train.global_batch_size, unit)}"
        )
    if config.data.sequence_length % mesh.tensor:
        problems.append(
            f"data.sequence_length={config.data.sequence_length} is not a multiple of mesh.tensor={mesh.tensor}, over which "
            f"the sequence is sharded between blocks; use {_nearest_multiples(config.data.sequence_length, mesh.tensor)}"
        )
    if pipeline.chunks > 1 and pipeline.schedule != "interleaved":
        problems.append(f"pipeline.chunks={pipeline.chunks} needs pipeline.schedule=interleaved, not {pipeline.schedule}")
    if pipeline.chunks > 1 and mesh.pipe == 1:
        problems.append(f"pipeline.chunks={pipeline.chunks} needs mesh.pipe above 1; with one stage use chunks=1")
    parts = mesh.pipe * pipeline.chunks
    if parts > layers:
        problems.append(
            f"mesh.pipe={mesh.pipe} x pipeline.chunks={pipeline.chunks} cuts model.num_layers={layers} into {parts} parts, "
            f"some without a layer; use at most {layers} parts"
        )
    return problems


def _other_problems(config: Config) -> list[str]:
    problems = []
    unknown = [name for name in config.train.remat_save if name not in REMAT_NAMES]
    problems += [f"train.remat_save has {name!r}: {nearest(name, REMAT_NAMES)}" for name in unknown]
    if not config.data.sources:
        problems.append("data.sources is empty; give at least one source")
    scaling = config.model.rope_scaling
    if scaling and not (scaling.factor > 0 and 0 < scaling.low_frequency_factor <= scaling.high_frequency_factor):
        problems.append(
            f"model.rope_scaling: factor={scaling.factor} must be above 0, and low_frequency_factor="
            f"{scaling.low_frequency_factor} between 0 and high_frequency_factor={scaling.high_frequency_factor}"
        )
    if scaling and scaling.original_length < 1:
        problems.append(f"model.rope_scaling.original_length={scaling.original_length} must be at least 1")
    for i, source in enumerate(config.data.sources):
        if source.weight <= 0:
            problems.append(f"data.sources.{i}.weight={source.weight} must be above 0; leave the source out instead")
        if source.kind not in ("stdlib", "synthetic") and not source.path:
            problems.append(f"data.sources.{i}.path is empty; a source of kind {source.kind} needs the files to read")
    if config.optimizer.warmup_steps > config.train.steps:
        problems.append(f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than train.steps={config.train.steps}")
    tokenizer = config.data.tokenizer
    if tokenizer.startswith("bpe:"):
        size = tokenizer[4:]
        if not size.isdigit() or int(size) < 257:
            problems.append(f"data.tokenizer={tokenizer!r}: the size after bpe: is a whole number of at least 257")
        elif int(size) > config.model.vocab_size:
            problems.append(f"data.tokenizer={tokenizer!r} makes ids beyond model.vocab_size={config.model.vocab_size}")
    window = re.fullmatch(r"(\d+):(\d+)", config.telemetry.profile)
    if config.telemetry.profile and (window is None or int(window[1]) > int(window[2])):
        problems.append(f"telemetry.profile={config.telemetry.profile!r}: give FIRST:LAST step, e.g. 10:13")
    if config.telemetry.hardware != "auto":
        try:
            find_chip(config.telemetry.hardware)
        except ExplainedError as error:
            problems.append(str(error))
    if not re.fullmatch(r"[\w.+-]+", config.name):
        problems.append(f"name={config.name!r}: use letters, digits and . _ + - only")
    return problems


def find_problems(config: Config, num_devices: int) -> tuple[Config, list[str]]:
    """The config with its mesh resolved for `num_devices`, and everything that is wrong with it, one line each."""
    problems = _type_problems(config)
    if problems:  # the rules below compute with the values, so they need right types
        return config, problems
    range_problems = _range_problems(config)
    mesh, mesh_problems = resolve_mesh(config.mesh, num_devices)
    problems = range_problems + mesh_problems
    if not any(problem.startswith(_SIZES) for problem in range_problems):
        problems += _model_problems(config.model, mesh)
        if not mesh_problems:
            problems += _layout_problems(config, mesh)
    problems += _other_problems(config)
    return dataclasses.replace(config, mesh=mesh), problems


def validate(config: Config, num_devices: int) -> Config:
    """The config with its mesh resolved for `num_devices`.

    Raises:
      ConfigError: with all the problems at once, each with its numbers and the nearest values that work.
    """
    resolved, problems = find_problems(config, num_devices)
    if problems:
        raise ConfigError(problems)
    return resolved


# ---------------------------------------------------------------------------------------------------------------------
# Files and the command line


def to_json(config: Config) -> str:
    """The fully resolved config, as it is written to run_dir/config.json and into every checkpoint."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def load_config(path: str | Path) -> Config:
    """Runs a config file and calls its `get_config()`. The file is Python code, and is trusted as such."""
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py"))
        hint = nearest(path.name, beside) if beside else f"there is no .py file in {path.parent.resolve()}; see configs/"
        raise ExplainedError(f"--config={path}: no such file; {hint}")
    spec = importlib.util.spec_from_file_location(f"jaxtrain_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ExplainedError(f"--config={path}: not a Python file; give one that defines get_config(), such as configs/7b.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ExplainedError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ExplainedError(f"--config={path}: get_config() gave a {type(config).__name__}, not a jaxtrain.config.Config")
    return config


def parse_command_line(arguments: Sequence[str], description: str, prog: str) -> Config:
    """Reads `--config=FILE` and every field as a typed flag over it.

    An unknown or ill-typed flag ends the process with exit code 2, naming the nearest right flag.
    """
    import tyro

    arguments, config_path = list(arguments), None
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            taken = 1 if "=" in argument else 2
            config_path = argument.partition("=")[2] if taken == 1 else "".join(arguments[i + 1 : i + 2])
            del arguments[i : i + taken]
            break
    if config_path == "":
        raise ConfigError(["--config needs a file, e.g. --config=configs/quickstart.py"])
    if config_path is None and not {"-h", "--help"} & set(arguments):
        raise ConfigError(["--config is missing; give a config file, e.g. --config=configs/quickstart.py"])
    default = load_config(config_path) if config_path else Config()
    return tyro.cli(
        Config,
        default=default,
        args=arguments,
        prog=f"{prog} --config=FILE",
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        use_underscores=True,
    )
