"""The model's configuration: the settings that make the one decoder that of many families (`huggingface/families/`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtrain.parts import ModelParts

VOCAB_MULTIPLE = 128
DType = Literal["float32", "bfloat16"]
LayerKind = Literal["global", "local", "nope"]


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the RoPE wavelengths beyond the length that the model was first trained on (`ops/rope.py` has formulas)."""

    kind: Literal["llama3", "linear", "yarn", "longrope"] = "llama3"
    """llama3: long wavelengths are stretched, short ones kept. linear: all are. yarn: between the two by rotations within the
    original length. longrope: each frequency is divided by a factor of its own."""
    factor: float = 8.0
    """Factor by which the context grows; longrope does not use it."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_length / this are stretched fully."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this are unchanged."""
    original_length: int = 8192
    """Context of the unstretched model, in tokens."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this within original_length are unchanged."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn less often than this are stretched fully."""
    truncate: bool = True
    """yarn: round the bounds of that range to whole frequencies."""
    attention_factor: float = 1.0
    """yarn, longrope: factor on the rotated queries and keys."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies for sequences of up to original_length; one for each pair of a head's numbers."""
    long_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies for longer sequences."""


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
    """Width of the part of a query and key head that RoPE rotates; even."""
    value_dim: int = 128
    """Width of a value head."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP: every token goes through a few SwiGLU experts chosen by the router.

    All auxiliary losses are means over the tokens that carry a loss, taken sequence by sequence, so neither microbatches nor
    the mesh can change them.
    """

    num_experts: int = 8
    """Number of routed experts."""
    experts_per_token: int = 2
    """Routed experts per token (top-k)."""
    mlp_dim: int = 1024
    """Hidden width of one expert."""
    shared_experts: int = 0
    """Experts that every token goes through, beside the routed ones; they are one MLP of shared_experts x mlp_dim."""
    first_dense_layers: int = 0
    """Number of first layers with a dense MLP (of model.mlp_dim). With a pipeline they belong to the first stage."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Function from router logits to scores, before the top-k."""
    normalize_weights: bool = True
    """Divide the scores of a token's experts by their sum."""
    weight_scale: float = 1.0
    """Factor on the weights of the routed experts (DeepSeek-V3: 2.5)."""
    groups: int = 1
    """Number of equal groups of experts; only groups_per_token of them are open to a token (node-limited routing)."""
    groups_per_token: int = 1
    """Groups open to a token: those with the best score."""
    group_score: Literal["top2", "max"] = "top2"
    """Score of a group: the sum of its two best experts' scores (DeepSeek-V3), or the best one (DeepSeek-V2)."""
    router_bias: bool = False
    """Add a learned bias to the router's logits."""
    selection_bias: bool = False
    """Keep the bias of bias_update_rate even where the rate is 0, for weights that were trained with one."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss E/k sum_e f_e P_e of each sequence; 0: none."""
    router_z_loss: float = 0.0
    """Weight of the mean of logsumexp(router logits)^2; 0: none."""
    bias_update_rate: float = 0.0
    """Auxiliary-loss-free balance: every step an expert's bias, used only to choose experts, rises by this if its load is
    below the mean, and falls if above; 0: no bias."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """dropless: every token reaches its experts. capacity: an expert takes a fixed number of a group's tokens and drops the
    rest."""
    capacity_factor: float = 1.25
    """capacity only: tokens per expert, relative to an even spread of a group's tokens."""
    exchange_factor: float = 0.0
    """dropless only, with mesh.expert: rows that a device's experts take, relative to an even spread; 0: all that may come.
    Rows beyond it are dropped and counted, the fullest experts' first: which ones, depends on the mesh."""
    capacity_group: int = 0
    """capacity only: number of consecutive tokens in a group; 0: the whole sequence."""

    def group(self, length: int) -> int:
        """Return the tokens of a group in which experts have room; a sequence's `length` positions are one by default."""
        return self.capacity_group or length

    @property
    def has_selection_bias(self) -> bool:
        """Return whether experts are chosen by score + bias."""
        return self.selection_bias or self.bias_update_rate > 0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685): a matrix is W + s A B, of which only A and B are trained.

    W is [inputs, outputs], A [inputs, rank], B [rank, outputs]; an expert has its own. B is 0 at first.
    """

    rank: int = 0
    """Rank of the adapters; 0: none, and all weights are trained."""
    alpha: float = 0.0
    """s = alpha / rank; 0: alpha is twice the rank."""
    targets: tuple[str, ...] = ()
    """Matrices with an adapter, as patterns of their names in a layer (attention/query, mlp/*, up); empty: all."""
    rank_stabilised: bool = False
    """s = alpha / sqrt(rank), so that the output's size does not depend on the rank (arXiv:2312.03732)."""
    init_from: str = ""
    """Folder of a PEFT adapter to begin with; empty: new ones."""
    base: Literal["", "int8", "float8", "nf4"] = ""
    """How W is held: int8, float8, or nf4, the 4-bit NormalFloat of QLoRA (arXiv:2305.14314), but table and head as they are;
    empty: all in model.param_dtype."""
    base_group: int = 0
    """Neighbouring inputs of a matrix with a float32 scale of their own; 0: 64 for nf4, else all of an output channel."""

    @property
    def scale(self) -> float:
        """s."""
        alpha = self.alpha or 2.0 * self.rank
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: causal grouped-query attention softmax(QK^T/sqrt(d_k))V and an MLP, by default with RoPE, RMSNorm, SwiGLU.

    The settings make it the decoder of many families: `huggingface/families/` has theirs.
    """

    num_layers: int = 4
    """Number of decoder layers."""
    embed_dim: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of query heads."""
    num_kv_heads: int = 4
    """Number of key and value heads; must divide num_heads (grouped-query attention)."""
    head_dim: int = 64
    """Width of one head, d_k of the attention formula; even, for RoPE."""
    mlp_dim: int = 1024
    """Hidden width of the MLP."""
    vocab_size: int = 257
    """Number of token ids. Stored padded up to a multiple of 128; the padding is masked in the loss, never exported."""
    pattern: tuple[LayerKind, ...] = ()
    """Kinds of layers that repeat through the stack. global: attention to the whole sequence. local: to sliding_window tokens.
    nope: global without positions. Empty: all local if sliding_window is set, else all global."""
    sliding_window: int = 0
    """Tokens that a query of a local layer sees, itself and those before it; 0: all."""
    rope_theta: float = 10_000.0
    """Base of the RoPE wavelengths."""
    local_rope_theta: float = 0.0
    """Base of the RoPE wavelengths in local layers, without rope_scaling; 0: as in the others."""
    rope_fraction: float = 1.0
    """Share of a head's numbers, the first ones, that RoPE rotates."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the RoPE wavelengths; None for plain RoPE."""
    learned_positions: int = 0
    """Rows of a learned table of positions, used in place of RoPE; 0: RoPE."""
    norm: Literal["rms", "layer"] = "rms"
    """rms: RMSNorm. layer: LayerNorm, which subtracts the mean."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside the norm."""
    norm_bias: bool = False
    """Add a learned bias after the norm."""
    norm_offset: float = 0.0
    """The norm's scale is this + the weight (Gemma: 1)."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Where a block's norm stands: pre: on its input; post: on its output, before it is added; both."""
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
    """sequential: the MLP reads what attention was added to. parallel: both read the same. parallel_one_norm: both read one
    norm's output."""
    residual_scale: float = 1.0
    """Factor on a block's output before it is added."""
    embedding_scale: float = 1.0
    """Factor on the embeddings."""
    logit_scale: float = 1.0
    """Factor on the logits."""
    logit_softcap: float = 0.0
    """Bound c of the logits, c tanh(logit / c); 0: none."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection too."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """RMSNorm on queries and keys before RoPE. head: on every head. width: over the width of all heads."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of attention: none, qkv (queries, keys and values), or all (the output projection too)."""
    attention_scale: float = 0.0
    """Factor on the scores q k; 0: 1 / sqrt(d_k)."""
    attention_softcap: float = 0.0
    """Bound c of the scores, c tanh(score / c); 0: none."""
    attention_sinks: bool = False
    """Give every query head a learned score that takes part in the softmax without a value."""
    latent_attention: LatentAttentionConfig | None = None
    """Multi-head latent attention; None for grouped-query attention."""
    activation: Literal["silu", "gelu", "gelu_tanh", "clipped_silu"] = "silu"
    """Activation of the MLP and of experts. clipped_silu: (clip(up) + 1) g sigmoid(1.702 g) with g = min(gate, limit)."""
    activation_limit: float = 7.0
    """clipped_silu: the limit of gate and up."""
    gated_mlp: bool = True
    """Whether the MLP is (act(h W_gate) * (h W_up)) W_down, else act(h W_up) W_down."""
    mlp_bias: bool = False
    """Biases of the MLP's, or the experts', projections."""
    moe: MoEConfig | None = None
    """Mixture of experts; None for a dense model."""
    dtype: DType = "bfloat16"
    """Compute dtype of matmuls and activations; softmax, norms and the loss are always float32."""
    matmul_dtype: Literal["default", "float8", "auto"] = "default"
    """How the matrices of attention, MLP and experts are multiplied. default: in model.dtype. float8: E4M3 forward, E5M2
    gradients. auto: float8 where the chip gains by it (see the log)."""
    param_dtype: DType = "float32"
    """Dtype of stored matrices; norms, routers, biases and the optimizer's moments are float32. bfloat16 is updated by
    stochastic rounding, the same on every mesh."""
    attention: Literal["auto", "reference", "blockwise", "cudnn"] = "auto"
    """Attention backend; auto: the fastest that the device and the mask allow (see the log)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; divided by sqrt(2 num_layers) for projections into the residual stream."""
    parts: ModelParts = field(default=ModelParts(), repr=False)
    adapters: LoraConfig = field(default=LoraConfig(), repr=False)

    @property
    def base(self) -> ModelConfig:
        """The model without adapters, all in param_dtype."""
        return replace(self, adapters=LoraConfig())

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The pattern, or the one kind of all layers where none is given."""
        return self.pattern or (("local",) if self.sliding_window else ("global",))

    def window_of(self, kind: LayerKind) -> int:
        """Return the tokens that a query sees in a layer of this kind; 0: all."""
        return self.sliding_window if kind == "local" else 0

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
