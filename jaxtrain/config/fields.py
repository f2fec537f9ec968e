"""The configuration: nested dataclasses, one meaning per field.

`loading.py` reads it from a file, `command/parsing.py` from flags. Imports neither jax nor anything else that is slow, so that
a typo is reported at once. Every field is a typed command-line flag (`--mesh.fsdp=8`), and the string below a field is its
help text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxtrain.config.data_fields import DataConfig
from jaxtrain.config.model_fields import DType, LoraConfig, ModelConfig
from jaxtrain.config.objective_fields import ObjectiveConfig
from jaxtrain.config.stage_fields import LearningRateSchedule, Stage
from jaxtrain.files import user_path
from jaxtrain.parts import Parts

MESH_AXES = ("replica", "pipe", "data", "fsdp", "expert", "context", "tensor")
REMAT_NAMES = ("query", "key", "value", "attention", "attention_out", "mlp_gate", "mlp_up", "mlp_hidden", "mlp_out")
REMAT_NAMES += ("router", "expert_in", "expert_gate", "expert_up", "expert_hidden", "expert_out")

FOLDED_SCHEDULES = ("v_shape", "zero_bubble_v")
"""Schedules whose second chunk goes back through the stages: the last part of the stack lies on the first stage."""
Compression = Literal["none", "bfloat16", "int8", "float8"]
BadStepPolicy = Literal["off", "stop", "skip", "rollback"]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. Their product must be the number of devices; one axis may be -1 (the remaining ones)."""

    replica: int = 1
    """Whole training replicas on slow links, synchronised as section `sync` says."""
    pipe: int = 1
    """Pipeline stages: layers are cut into stages."""
    data: int = 1
    """Data parallelism with replicated parameters."""
    fsdp: int = -1
    """Data parallelism with sharded parameters, gradients and optimizer state."""
    expert: int = 1
    """Expert parallelism: shards the experts; outside them a further axis of data parallelism."""
    context: int = 1
    """Context parallelism: shards the sequence, inside attention too."""
    tensor: int = 1
    """Tensor parallelism over heads, MLP width and vocabulary, with the sequence sharded between blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of MESH_AXES."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def batch_shards(self) -> int:
        """Number of shards of the global batch."""
        return self.replica * self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class ShardingConfig:
    """Choices for the mesh axes. None of them changes a result."""

    zero: Literal[1, 2, 3] = 3
    """What `fsdp` shards (Rajbhandari et al. 2020). 1: master weights and optimizer state; weights are gathered and gradients
    reduced once a step. 2: gradients too, reduced in every microbatch. 3: the weights too, gathered layer by layer."""
    context_attention: Literal["auto", "ring", "gather", "ulysses"] = "auto"
    """How attention reaches the keys of other devices along `context`. ring: one device at a time; gather: all at once;
    ulysses: heads are exchanged for sequence; auto: chosen by size (see the log)."""
    take_turns: bool = True
    """Interleave two halves of a device's sequences, so that one half's transfers overlap with the other half's matmuls. Needs
    tensor or expert above 1, and an even number of sequences per device in a microbatch."""


@dataclass(frozen=True)
class SyncConfig:
    """Synchronisation of the replicas (mesh axis `replica`)."""

    mode: Literal["every_step", "local", "diloco", "delayed"] = "every_step"
    """every_step: gradients are averaged in every step. local: parameters are averaged every `every` steps. diloco: as local,
    with outer Nesterov momentum on the difference. delayed: averaged gradients are applied `delay` steps late."""
    every: int = 20
    """local, diloco: inner steps between two exchanges (H)."""
    outer_lr: float = 0.7
    """diloco: learning rate of the outer Nesterov step."""
    outer_momentum: float = 0.9
    """diloco: momentum of the outer Nesterov step."""
    fragments: int = 1
    """local, diloco: number of interleaved fragments of the layers, exchanged one after another, each every `every` steps."""
    delay: int = 1
    """delayed: steps between a gradient and its use (tau). 0 is every_step."""
    overlap: int = 0
    """local, diloco: inner steps that an exchange overlaps with before its result is used."""
    mixing: float = 0.5
    """overlap above 0: share of its own parameters that a replica keeps when a late result arrives (Streaming DiLoCo)."""
    compression: Compression = "none"
    """Dtype of transfers between replicas; none: float32. int8 and float8 have one float32 scale per block."""
    compression_block: int = 256
    """Numbers per scale."""
    error_feedback: bool = False
    """Add the compression error to the next exchange."""

    @property
    def replicas_differ(self) -> bool:
        """Return whether each replica has its own parameters and optimizer state."""
        return self.mode in ("local", "diloco")

    @property
    def queued(self) -> int:
        """Steps that gradients are queued before they are averaged and applied; 0 except for delayed."""
        return self.delay if self.mode == "delayed" else 0

    @property
    def sums_apart(self) -> bool:
        """Return whether a step's gradients are summed inside a replica only, and `parallel/sync.py` does the rest."""
        return self.replicas_differ or self.queued > 0 or self.compression != "none"

    @property
    def outer(self) -> tuple[float, float]:
        """(learning rate, momentum) of the outer step: local is diloco's with 1 and 0, which is the mean."""
        return (self.outer_lr, self.outer_momentum) if self.mode == "diloco" else (1.0, 0.0)


@dataclass(frozen=True)
class PipelineConfig:
    """The order of the pipeline stages' work in time."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "v_shape", "zero_bubble_v"] = "1f1b"
    """Order of forward and backward work over the stages. zero_bubble: interleaved, with the weight gradients' matmuls put off
    into the ticks in which a stage would wait; for memory (their operands) it saves up to two thirds of the bubble. v_shape:
    two chunks, of which the second goes back from the last stage to the first; 1f1b's bubble for half of its activations.
    zero_bubble_v: both."""
    chunks: int = 1
    """Number of parts of the layer stack per stage. interleaved, zero_bubble: any; v_shape, zero_bubble_v: 2; others: 1."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate over time."""

    name: Literal["adamw", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """The update rule. muon orthogonalises matrices in model.dtype; embedding, head, norms and biases take adamw."""
    peak_lr: float = 3e-4
    """Largest learning rate."""
    schedule: LearningRateSchedule = "cosine"
    """Learning rate over steps, after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up; capped at half of train.steps, for short trial runs."""
    decay_fraction: float = 0.2
    """warmup_stable_decay only: last share of the steps, over which the rate falls; at least one step, outside warm-up."""
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
    moments_dtype: Literal["float32", "int8"] = "float32"
    """Dtype of matrices' moments between steps. int8: 8 bits and a scale for each 64; a quarter of the memory."""
    moments_memory: Literal["device", "host"] = "device"
    """Where matrices' moments lie between steps. host: pinned memory of the host; each update copies them in and out."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, size and precision of the training."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    stages: tuple[Stage, ...] = ()
    """What changes on the way: mixture, batch, length, learning rate; flags are --train.stages.0.from_step and so on."""
    seed: int = 0
    """Seed of the initial parameters and of the data order."""
    global_batch_size: int = 32
    """Sequences per step over all devices."""
    microbatches: int = 1
    """Number of parts of a step's batch (gradient accumulation; a pipeline needs several)."""
    log_every: int = 10
    """Steps between two logged rows."""
    validate_every: int = 100
    """Steps between two validations; 0: none. Above 0, the last step validates too."""
    validate_batches: int = 0
    """Batches of global_batch_size in a validation, their rows spread evenly over each set; 0: all held-out data."""
    position_ranges: int = 0
    """Ranges of positions in a document, each twice as long as the one before, whose loss a validation tells too; 0: none."""
    stop_at_validation_loss: float = 0.0
    """Validation loss (nats per token) at which the run stops; 0: never."""
    validation_metric: str = "validation_loss"
    """Number of a validation that stop_at_validation_loss and checkpoint.keep_best read, by its name in metrics.jsonl."""
    remat: Literal["none", "dots", "named", "full"] = "full"
    """Recomputation in the backward pass. none: nothing; dots: all but matmuls; named: all but remat_save; full: each layer."""
    remat_save: tuple[str, ...] = ("attention",)
    """remat=named only: names of the activations to keep."""
    layer_inputs_memory: Literal["device", "host"] = "device"
    """Where the inputs of layers wait for the backward pass. host: pinned memory of the host, by copies behind the layers."""
    reduce_dtype: DType = "float32"
    """Dtype in which gradients are summed over devices."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, which keeps logits from drifting; 0: none."""
    ema_decay: float = 0.0
    """Decay a step of a moving average of the trained weights, float32; validated too, and named RUN@ema; 0: none."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained, as patterns of their names ("outer/*", "layers/mlp/*")."""
    loss_chunk: int = 512
    """Tokens of a sequence whose logits exist at one time."""
    tasks: tuple[str, ...] = ()
    """Files of tasks that the model is measured on as it is trained (jaxtrain/evaluation/README.md)."""
    tasks_every: int = 0
    """Steps between two measurements of train.tasks; the last step is always measured."""
    sample_tokens: int = 0
    """Tokens to sample from the trained model at the end of the run, from held-out text; 0: none."""
    deterministic: bool = False
    """Make two runs on the same mesh equal bit for bit on GPUs too: XLA and cuDNN use only kernels that sum in a fixed order,
    not chosen by timing. Slower on GPUs."""
    xla_options: tuple[str, ...] = ()
    """Options for XLA over those of train/xla_options.py, each as name=value."""
    compilation_cache: str = "~/.cache/jaxtrain/compilation"
    """Folder of the persistent compilation cache; empty: none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: int = 1000
    """Steps between two checkpoints; the last step is always saved. 0: save nothing."""
    keep: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    keep_best: int = 0
    """Also keep so many checkpoints with the best train.validation_metric, of those saved in a step that validated; 0: none."""
    resume: str = "auto"
    """auto: resume from the newest checkpoint in run_dir, if any; never: refuse a run_dir that has some; required: need one.
    STEP: go back to that step of run_dir, whose later checkpoints become a branch. RUN@STEP, RUN@best: go on with another run
    from there, in this run_dir."""
    asynchronous: bool = True
    """Write checkpoints while training goes on."""
    on_failure: Literal["retry", "stop"] = "retry"
    """Reaction to a failed save when the next one begins. retry: warn and go on, but the last save must succeed. stop: end the
    run."""
    mirror: str = ""
    """URL in an object store (s3://, gs://, any that fsspec knows): committed checkpoints are uploaded there in the background,
    and a run whose folder holds none resumes from there; empty: none."""
    fast_every: int = 0
    """Steps between two snapshots in fast_dir, from which a run resumes if its processes died but not its hosts; 0: none."""
    fast_dir: str = "/dev/shm"
    """Folder for snapshots in each host's own memory or on its own disk; holds two at a time."""
    export_hf: str = ""
    """Folder to make at the run's end, with the weights as a HuggingFace model (`jaxtrain export`); empty: none."""


@dataclass(frozen=True)
class GuardConfig:
    """Reaction to numbers that go wrong. off: nothing. stop: end the run. skip: leave parameters and optimizer unchanged.
    rollback: go back to the newest checkpoint and leave the batch out."""

    non_finite: BadStepPolicy = "stop"
    """Reaction to a step whose loss or gradient norm is not finite."""
    spike: BadStepPolicy = "off"
    """Reaction to a step whose loss or gradient norm is far above that of the good steps before it."""
    spike_deviations: float = 6.0
    """Threshold of a spike: (x - median) / (1.4826 median absolute deviation) over the window."""
    spike_window: int = 128
    """Number of good steps in the window; spikes are detected once it is half full."""
    rollback_batches: int = 1
    """rollback: number of batches to leave out, ending with the bad step's; none from before the checkpoint."""
    budget: int = 10
    """Number of skips and rollbacks in the whole run; the next bad step stops it."""
    copies: Literal["off", "stop", "rollback"] = "stop"
    """Reaction to devices whose copies of the state differ by a bit. They are compared before every save."""
    copies_every: int = 0
    """Steps between further comparisons; 0: none."""
    repeat_every: int = 0
    """Steps between checks that compute a step's gradients twice more and compare them bit for bit; 0: none. On GPUs it needs
    train.deterministic."""
    debug_nans: bool = False
    """Compute a non-finite step again, and name the first bad microbatch, layer and operation; slower."""

    @property
    def classifies_steps(self) -> bool:
        """Return whether the compiled step itself decides if its update is applied."""
        return self.debug_nans or self.spike != "off" or self.non_finite in ("skip", "rollback")


@dataclass(frozen=True)
class TelemetryConfig:
    """Reports of a run."""

    wandb_project: str = ""
    """Weights & Biases project; empty: none. The key comes from the environment."""
    prometheus: str = ""
    """File for Prometheus (node_exporter's textfile collector), ending in .prom, replaced at each logged row; empty: none."""
    profile: str = ""
    """Steps to trace as FIRST:LAST, e.g. 10:13 (XProf and Perfetto, in run_dir/profile); empty: none."""
    energy: Literal["auto", "nvml", "rapl", "none"] = "auto"
    """Energy meter: nvml (GPUs), rapl (CPUs), auto (whichever fits and can be read), or none."""
    hardware: str = "auto"
    """Chip whose peak FLOP/s the MFU is measured against, by name or as a chip file; auto: the device's own."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run: address and time limits. Our supervisor, SLURM, Open MPI, Kubernetes and Ray need no flags."""

    coordinator: str = ""
    """host:port of process 0; empty: the starter's."""
    processes: int = 0
    """Number of processes; 0: the starter's."""
    process_id: int = -1
    """Index of this process, from 0; -1: the starter's."""
    heartbeat_seconds: int = 30
    """Seconds without a heartbeat after which a process is lost, and all end."""
    start_timeout_seconds: int = 300
    """Seconds that processes wait for one another at the start."""
    hang_seconds: int = 300
    """Seconds (at least 20 times the usual step) without progress after which a step has hung; all processes then end and
    are restarted. 0: never."""
    phase_seconds: int = 1800
    """Time limit in seconds of the first step, saving, restoring, validating, sampling or waiting for a peer; 0: none. Reading
    data and compiling may take a day."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    name: str = "run"
    """Name of the run."""
    run_dir: str = ""
    """Folder for everything the run writes; empty: runs/NAME."""
    init_from: str = ""
    """Initial weights: a HuggingFace folder, or RUN[@STEP] of another run; empty: random ones. RUN@best is its best step by
    validation, RUN@ema and RUN@STEP@ema the average of its weights. A larger model.vocab_size gets rows that are the mean of
    the others."""
    init_from_optimizer: bool = False
    """Take the optimizer state of init_from's run too."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    parts: Parts = field(default=Parts(), repr=False)

    def __post_init__(self) -> None:
        """Tell the model of its adapters, which are parameters of its layers."""
        if isinstance(self.model, ModelConfig) and isinstance(self.lora, LoraConfig):
            adapters = dataclasses.replace(self.lora, init_from="")
            if self.model.adapters != adapters:
                object.__setattr__(self, "model", dataclasses.replace(self.model, adapters=adapters))

    @property
    def directory(self) -> Path:
        """run_dir, or by default runs/NAME."""
        return user_path(self.run_dir) if self.run_dir else Path("runs") / self.name
