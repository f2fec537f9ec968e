"""The configuration: nested dataclasses, one meaning a field.

`loading.py` reads it from a file, `command/parsing.py` from flags. Imports neither jax nor anything else that is slow, so that
a typo is answered in a moment. Every field is a typed command-line flag (`--mesh.fsdp=8`), and the string below a field is its
help text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxtrain.errors import ConfigError, nearest
from jaxtrain.files import user_path
from jaxtrain.parts import ModelParts, Parts

MESH_AXES = ("replica", "pipe", "data", "fsdp", "expert", "context", "tensor")
VOCAB_MULTIPLE = 128
REMAT_NAMES = ("query", "key", "value", "attention", "attention_out", "mlp_gate", "mlp_up", "mlp_hidden", "mlp_out")
REMAT_NAMES += ("router", "expert_in", "expert_gate", "expert_up", "expert_hidden", "expert_out")

DType = Literal["float32", "bfloat16"]
AttentionBackend = Literal["auto", "reference", "blockwise", "cudnn"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved"]
RematPolicy = Literal["none", "dots", "named", "full"]
ROW_KINDS = ("jsonl", "parquet", "array_record")
SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "tokens", "array_record", "synthetic"]
OptimizerName = Literal["adamw", "sgd", "adafactor", "lion", "muon"]
LearningRateSchedule = Literal["constant", "cosine", "warmup_stable_decay", "inverse_sqrt"]
ResumeMode = Literal["auto", "never", "required"]
SaveFailurePolicy = Literal["retry", "stop"]
Router = Literal["softmax", "sigmoid"]
Dispatch = Literal["dropless", "capacity"]
ContextAttention = Literal["auto", "ring", "gather", "ulysses"]
ZeroLevel = Literal[1, 2, 3]
SyncMode = Literal["every_step", "local", "diloco", "delayed"]
Compression = Literal["none", "bfloat16", "int8", "float8"]
EnergySource = Literal["auto", "nvml", "rapl", "none"]
BadStepPolicy = Literal["off", "stop", "skip", "rollback"]
CopiesPolicy = Literal["off", "stop", "rollback"]


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
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are projected up from one small latent.

    A query or key head is `model.head_dim` numbers without position beside `rope_dim` with RoPE; the latter half of the key
    is one for all heads.
    """

    query_rank: int = 1536
    """Width of the queries' latent; 0 projects queries straight from the residual stream."""
    kv_rank: int = 512
    """Width of the latent of keys and values."""
    rope_dim: int = 64
    """Width of the part of a query and key head that RoPE turns; even."""
    value_dim: int = 128
    """Width of a value head."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP: every token goes through the few SwiGLU experts that its router picks.

    All auxiliary losses are means over the tokens that carry a loss, taken sequence by sequence, so neither microbatches nor
    the mesh can change them.
    """

    num_experts: int = 8
    """Routed experts."""
    experts_per_token: int = 2
    """Routed experts that a token goes through (top-k)."""
    mlp_dim: int = 1024
    """Hidden width of one expert."""
    shared_experts: int = 0
    """Experts that every token goes through, beside the routed ones; they are one MLP of shared_experts x mlp_dim."""
    first_dense_layers: int = 0
    """Layers at the start that keep a dense MLP (of model.mlp_dim). With a pipeline they belong to the first stage."""
    router: Router = "softmax"
    """How router logits become scores, before the top-k is taken."""
    normalize_weights: bool = True
    """Divide the scores of a token's experts by their sum."""
    weight_scale: float = 1.0
    """Factor on the weights of the routed experts (DeepSeek-V3: 2.5)."""
    groups: int = 1
    """Experts are in this many equal groups; only groups_per_token of them are open to a token (node-limited routing)."""
    groups_per_token: int = 1
    """Groups whose experts a token may take: those with the largest sum of their two best scores."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss E/k sum_e f_e P_e of each sequence; 0 for none."""
    router_z_loss: float = 0.0
    """Weight of the mean of logsumexp(router logits)^2; 0 for none."""
    bias_update_rate: float = 0.0
    """Auxiliary-loss-free balance: every step an expert's bias, which only the choice of experts sees, goes this far up where
    its load is below the mean, down where above; 0 for no bias."""
    dispatch: Dispatch = "dropless"
    """dropless: every token reaches its experts. capacity: an expert takes so many tokens of a group, and drops the rest."""
    capacity_factor: float = 1.25
    """capacity only: room of an expert, relative to an even spread of a group's tokens."""
    capacity_group: int = 0
    """capacity only: consecutive tokens of a sequence that share the experts' room; 0 for the whole sequence."""


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
    sliding_window: int = 0
    """Tokens that a query sees, itself and those before it; 0 for all of them."""
    latent_attention: LatentAttentionConfig | None = None
    """Multi-head latent attention; None for grouped-query attention."""
    moe: MoEConfig | None = None
    """Mixture of experts; None for a dense model."""
    dtype: DType = "bfloat16"
    """Compute dtype of matmuls and activations; softmax, norms and the loss are always float32."""
    param_dtype: DType = "float32"
    """Dtype in which matrices are kept; norms, routers and biases are float32, and so are the optimizer's moments. bfloat16 is
    updated by stochastic rounding, the same on every mesh."""
    attention: AttentionBackend = "auto"
    """Attention backend; auto takes the fastest that the device and the mask allow, and the log says which."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get it over sqrt(2 num_layers)."""
    parts: ModelParts = field(default=ModelParts(), repr=False)

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128: the same on every mesh, so that the parameters are too."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def first_dense_layers(self) -> int:
        """Dense layers before the stack of like layers; they are held beside the embedding."""
        return self.moe.first_dense_layers if self.moe else 0

    @property
    def stacked_layers(self) -> int:
        """Layers in the stack that is scanned and cut into pipeline stages."""
        return self.num_layers - self.first_dense_layers


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. The product must equal the number of devices; one axis may be -1 (whatever is left)."""

    replica: int = 1
    """Whole training replicas on slow links; how they keep together is `sync`."""
    pipe: int = 1
    """Pipeline stages: layers are cut into stages."""
    data: int = 1
    """Data parallelism with replicated parameters."""
    fsdp: int = -1
    """Data parallelism with sharded parameters, gradients and optimizer state."""
    expert: int = 1
    """Expert parallelism: experts are shared out; outside of them a further axis of data parallelism."""
    context: int = 1
    """Context parallelism: the sequence is shared out, inside attention too."""
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
class ShardingConfig:
    """What the mesh axes do where there is a choice. Nothing here changes a result."""

    zero: ZeroLevel = 3
    """What `fsdp` shards (Rajbhandari et al. 2020). 1: master weights and optimizer state; weights are gathered and gradients
    reduced once a step. 2: gradients too, reduced in every microbatch. 3: the weights too, gathered layer by layer."""
    context_attention: ContextAttention = "auto"
    """How attention reaches the keys of other devices along `context`. ring: they come round one device at a time; gather:
    all at once; ulysses: heads are exchanged for sequence. auto chooses, and the log says why."""
    take_turns: bool = True
    """With tensor or expert above 1, and an even number of sequences in a device's share of a microbatch: compute the layers on
    two halves of them in turns, so that one half's transfers travel behind the other half's matmuls."""


@dataclass(frozen=True)
class SyncConfig:
    """How replicas (mesh axis `replica`) keep together."""

    mode: SyncMode = "every_step"
    """every_step: gradients are averaged in every step. local: parameters are averaged every `every` steps. diloco: as local,
    with outer Nesterov momentum on the difference. delayed: averaged gradients are applied `delay` steps late."""
    every: int = 20
    """local, diloco: inner steps between two exchanges (H)."""
    outer_lr: float = 0.7
    """diloco: learning rate of the outer Nesterov step."""
    outer_momentum: float = 0.9
    """diloco: momentum of the outer Nesterov step."""
    fragments: int = 1
    """local, diloco: the layers are exchanged in this many interleaved fragments, in turn, each every `every` steps."""
    delay: int = 1
    """delayed: steps between a gradient and its use (tau). 0 is every_step."""
    overlap: int = 0
    """local, diloco: steps for which an exchange may travel behind the inner steps before its result is used."""
    mixing: float = 0.5
    """overlap above 0: share of its own parameters that a replica keeps as a late result arrives (Streaming DiLoCo's alpha)."""
    compression: Compression = "none"
    """What travels between replicas: float32, or this dtype (int8 and float8 with one float32 scale per block)."""
    compression_block: int = 256
    """Numbers that share a scale."""
    error_feedback: bool = False
    """Add what compression lost to the next exchange."""

    @property
    def replicas_differ(self) -> bool:
        """Whether each replica has parameters and optimizer state of its own."""
        return self.mode in ("local", "diloco")

    @property
    def queued(self) -> int:
        """Steps for which gradients wait before they are averaged and applied; 0 but for delayed."""
        return self.delay if self.mode == "delayed" else 0

    @property
    def sums_apart(self) -> bool:
        """Whether a step's gradients are summed inside a replica only, and `parallel/sync.py` does the rest."""
        return self.replicas_differ or self.queued > 0 or self.compression != "none"

    @property
    def outer(self) -> tuple[float, float]:
        """(learning rate, momentum) of the outer step: local is diloco's with 1 and 0, which is the mean."""
        return (self.outer_lr, self.outer_momentum) if self.mode == "diloco" else (1.0, 0.0)


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
    made by `jaxtrain tokenize`. array_record: one UTF-8 document a record. synthetic: random tokens."""
    path: str = ""
    """Files to read, as a glob ("books/**/*.txt"); several globs are separated by commas. text and jsonl may be compressed:
    gzip, bzip2, xz, zstd."""
    text_field: str = "text"
    """Which field of a JSONL or Parquet row holds the text."""
    max_bad_rows: float = 0.0
    """Largest share of the rows that may be broken (not JSON, not UTF-8, without text): they are left out and counted. 0: the
    first one is an error."""
    separator: int = -1
    """tokens of others, as .npy, only: the id with which each document begins; -1: the ids are one stream."""
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
    """Share of the documents that is held out, each by the hash of its own text, so that copies are never on both sides; of a
    document of more than 100,000 characters, the end. Few documents may have none held out."""
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
    """Steps of linear warm-up; at most half of train.steps, so that a short trial run needs no other number."""
    decay_fraction: float = 0.2
    """warmup_stable_decay only: the last share of the steps over which the rate falls; at least one, none of warm-up."""
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
    deterministic: bool = False
    """Two runs on the same mesh give the same bits, on GPUs too: XLA and cuDNN keep to kernels that add up in one order, and
    choose none by timing it. Slower there."""
    xla_options: tuple[str, ...] = ()
    """Options for XLA over those of train/xla_options.py, each as name=value."""
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
    on_failure: SaveFailurePolicy = "retry"
    """A save that fails, when the next one begins. retry: it is told, and the run goes on; the last one must succeed. stop: the
    run ends."""
    mirror: str = ""
    """URL in an object store (s3://, gs://, whatever fsspec knows): committed checkpoints are copied there behind training, and
    a run whose folder holds none goes on from there; empty for no copies."""
    fast_every: int = 0
    """Steps between two snapshots in fast_dir, from which a run goes on whose processes died and whose hosts did not; 0 for
    none."""
    fast_dir: str = "/dev/shm"
    """Folder for snapshots in each host's own memory or on its own disk; two of them at a time."""


@dataclass(frozen=True)
class GuardConfig:
    """What is done about numbers that go wrong. off: nothing. stop: end the run. skip: leave parameters and optimizer as they
    are. rollback: go back to the newest checkpoint and leave the batch out."""

    non_finite: BadStepPolicy = "stop"
    """A step whose loss or gradient norm is not finite."""
    spike: BadStepPolicy = "off"
    """A step whose loss or gradient norm is far above that of the good steps before it."""
    spike_deviations: float = 6.0
    """How far: (x - median) / (1.4826 median absolute deviation) over the window."""
    spike_window: int = 128
    """Good steps in the window; nothing is a spike before it is half full."""
    rollback_batches: int = 1
    """rollback: batches to leave out, the last of which is the bad step's; none from before the checkpoint."""
    budget: int = 10
    """Skips and rollbacks in the whole run, after which a bad step stops it."""
    copies: CopiesPolicy = "stop"
    """Devices whose copies of the state differ by a bit. They are compared before every save."""
    copies_every: int = 0
    """Steps between further comparisons; 0 for none."""
    repeat_every: int = 0
    """Steps between two whose gradients are computed twice more and compared bit for bit; 0 for none. On GPUs it needs
    train.deterministic."""
    debug_nans: bool = False
    """Compute a step that is not finite again, and name the microbatch, layer and operation that were first; slower."""

    @property
    def classifies_steps(self) -> bool:
        """Whether the compiled step itself decides if its update is applied."""
        return self.debug_nans or self.spike != "off" or self.non_finite in ("skip", "rollback")


@dataclass(frozen=True)
class TelemetryConfig:
    """What a run tells."""

    wandb_project: str = ""
    """Weights & Biases project; empty for none. The key comes from the environment."""
    profile: str = ""
    """Steps to trace as FIRST:LAST, e.g. 10:13 (XProf and Perfetto, in run_dir/profile); empty for none."""
    energy: EnergySource = "auto"
    """What measures the energy: nvml (GPUs), rapl (CPUs), auto for whichever fits and can be read, or none."""
    hardware: str = "auto"
    """Chip whose peak FLOP/s the MFU is measured against, by name or as a chip file; auto asks the device."""


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find one another; under our supervisor, SLURM, Open MPI, Kubernetes and Ray by themselves."""

    coordinator: str = ""
    """host:port at which process 0 is reached; empty for what the starter says."""
    processes: int = 0
    """Processes in all; 0 for what the starter says."""
    process_id: int = -1
    """This process, from 0; -1 for what the starter says."""
    heartbeat_seconds: int = 30
    """A process that has been silent for so long is lost, and all end."""
    start_timeout_seconds: int = 300
    """How long processes wait for one another at the start."""
    hang_seconds: int = 300
    """A step that has not moved for so long has hung, or for 20 times the usual step where that is longer; all processes end
    and are started again. 0 for never."""
    phase_seconds: int = 1800
    """The first step, saving, restoring, validating, sampling or waiting for a peer may take so long; 0 for ever. Reading data
    and compiling may take a day."""


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
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    parts: Parts = field(default=Parts(), repr=False)

    @property
    def directory(self) -> Path:
        """run_dir, or runs/NAME where none is given."""
        return user_path(self.run_dir) if self.run_dir else Path("runs") / self.name


# ---------------------------------------------------------------------------------------------------------------------
# As JSON


PARTS = "parts"
"""The field of `Config` and `ModelConfig` that is no setting: no flag and no JSON holds it."""


def to_plain(part: Any) -> Any:
    """Return a config, or a section of one, as dicts, without the parts that are plugged in."""
    if dataclasses.is_dataclass(part):
        return {field.name: to_plain(getattr(part, field.name)) for field in dataclasses.fields(part) if field.name != PARTS}
    return tuple(map(to_plain, part)) if isinstance(part, tuple) else part


def to_json(config: Config) -> str:
    """Return the fully resolved config, as it is written to run_dir/config.json and into every checkpoint."""
    return json.dumps(to_plain(config), indent=2)


def from_json(text: str, like: Config | None = None) -> Config:
    """Return the config that `to_json` wrote. Builds dataclasses and nothing else; whether the values work, `validate` says.

    Args:
      like: a config of the same sections, which may be subclasses, and with the parts to plug in; None for `Config()`.

    Raises:
      ConfigError: it is no such text; names the field.
    """
    try:
        return _from_plain(json.loads(text), Config, "config", like or Config())
    except (ValueError, RecursionError) as error:  # of json
        raise ConfigError([f"not the JSON of a config: {error}"]) from error


def _from_plain(value: Any, hint: Any, path: str, like: Any = None) -> Any:
    """Return a JSON value as a field's type wants it: objects become dataclasses, lists tuples; anything else is left as it
    is.
    """
    if get_origin(hint) is UnionType:  # X | None
        return None if value is None else _from_plain(value, get_args(hint)[0], path, like)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_from_plain(item, get_args(hint)[0], f"{path}.{i}") for i, item in enumerate(value))
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return value
    if not isinstance(value, dict):
        raise ConfigError([f"{path}={value!r} is not an object of fields"])
    kind = type(like) if isinstance(like, hint) else hint
    hints = {name: of for name, of in get_type_hints(kind).items() if name != PARTS}
    unknown = [f"{path}.{name}: there is no such field; {nearest(name, hints)}" for name in value if name not in hints]
    if unknown:
        raise ConfigError(unknown)
    fields = {n: _from_plain(item, hints[n], f"{path}.{n}", getattr(like, n, None)) for n, item in value.items()}
    return kind(**fields, **({PARTS: getattr(like, PARTS)} if hasattr(like, PARTS) else {}))
