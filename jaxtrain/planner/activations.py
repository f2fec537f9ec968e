"""What a layer's forward leaves for its backward, in bytes: the residuals of its vjp under the remat policy.

A test traces layers and counts what they keep; these are the same numbers. Letters as in `memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtrain.config import Config, ModelConfig, MoEConfig
from jaxtrain.layout import (
    KERNEL_TILE,
    capacity_rows,
    exchange_rows,
    inputs_on_host,
    keeps,
    local_length,
    microbatch_rows,
    padded_rows,
    parts_in_turns,
)
from jaxtrain.ops.attention_choice import context_kind
from jaxtrain.planner.layer_table import BYTES, FLOAT32, count_norms, is_gated, is_read_again, layer_weights, matmuls


@dataclass(frozen=True)
class Sizes:
    """Numbers (not bytes) of one microbatch's activations on one device."""

    tokens: int
    """B L: rows of a matmul."""
    parts: int
    """Parts of the microbatch that take turns."""
    stream: float
    """B L D / t: the residual stream."""
    sequence: float
    """B L D: gathered over tensor."""
    query: float
    """B L H N / t; of latent attention with the part that RoPE turns."""
    key: float
    """B L K N / t; of latent attention without that part, which all heads share."""
    value: float
    """B L K M / t, M the width of a value head."""
    result: float
    """B L H M / t: attention's result."""
    latents: float
    """B L (Q + C + R) / t: latent attention's projections down."""
    mlp: float
    """B L F / t."""
    statistics: float
    """B L H / t: logsumexp."""
    rows: float
    """Rows that a device's experts may get."""
    choices: float
    """B L x experts of a token."""

    @staticmethod
    def of(config: Config) -> Sizes:
        """Return those of a valid config, from the products of the layer table."""
        model, tensor, batch = config.model, config.mesh.tensor, microbatch_rows(config)
        tokens = batch * local_length(config)
        parts = parts_in_turns(config.sharding, config.mesh, batch)
        weights = layer_weights(model).values()
        made = {weight.result: tokens * weight.outputs / tensor for weight in weights if weight.result}
        down = sum(weight.outputs for weight in weights if weight.dims[-1] == "rank")
        return Sizes(
            tokens=tokens,
            parts=parts,
            stream=tokens * model.embed_dim / tensor,
            sequence=tokens * model.embed_dim,
            query=made.get("query", 0.0),
            key=made.get("key", 0.0),
            value=made.get("value", 0.0),
            result=sum(tokens * weight.inputs / tensor for weight in weights if weight.result == "attention_out"),
            latents=tokens * down / tensor,
            mlp=made.get("mlp_up", 0.0),
            statistics=tokens * model.num_heads / tensor,
            rows=parts * _expert_rows(config, model.moe, tokens // parts) if model.moe else 0,
            choices=tokens * model.moe.experts_per_token if model.moe else 0,
        )


def _expert_rows(config: Config, moe: MoEConfig, tokens: int) -> int:
    """Return the rows for which there is room where `tokens` are dispatched.

    Dropless: P T min(K, E / P) on P devices, since every token of every device may come here, or exchange_factor T K, and each
    expert padded to whole tiles. Capacity: E x groups x ceil(factor G K / E).
    """
    devices, local = config.mesh.expert, moe.num_experts // config.mesh.expert
    if moe.dispatch == "dropless":
        rows = exchange_rows(tokens, moe.experts_per_token, devices, local, moe.exchange_factor)
        return padded_rows(rows, local, KERNEL_TILE)
    return capacity_rows(moe, tokens, local_length(config))


def folds(config: Config) -> bool:
    """Return whether attention is folded from pieces along context (ring, gather)."""
    return config.mesh.context > 1 and context_kind(config)[0] != "ulysses"


def kept_bytes(config: Config, sizes: Sizes, backend: str) -> float:
    """Return the bytes that one layer keeps of one microbatch on the device."""
    on_host = BYTES[config.model.dtype] * sizes.stream if inputs_on_host(config.train) else 0.0
    return _residuals(config, sizes, backend) - on_host


def _residuals(config: Config, sizes: Sizes, backend: str) -> float:
    """Return the bytes that one layer keeps of one microbatch: the residuals of its vjp under the remat policy."""
    remat, bytes_each = config.train.remat, BYTES[config.model.dtype]
    stream = bytes_each * sizes.stream
    if remat == "full":
        return stream
    if remat == "none":
        return _kept_of_everything(config, sizes, backend)
    kept = sum(size for name, size in _named(config, sizes, backend).items() if keeps(config.train, name))
    if remat == "dots":
        # What a projection back makes is kept before it is summed over tensor: over the whole length.
        projections = sum(is_read_again(config.model, name) for name in _projections(config.model))
        kept += bytes_each * (projections * sizes.sequence + sizes.latents)
    return stream + kept


def operand_bytes(config: Config, sizes: Sizes) -> float:
    """Return the bytes that one layer's backward pass leaves of one microbatch for its weights' gradients (`backward_split`).

    These are the operands of their matmuls: the input of each weight, once where weights share it (queries, keys and values;
    gate and up), and the gradient of each product.
    """
    inputs, gradients = {}, 0.0
    for weight, m, k, n, batch, _ in matmuls(config):
        rows = sizes.rows if weight.is_of_experts else m * batch
        inputs[_SHARED_INPUT.get(weight.result, weight.name), weight.is_of_experts] = rows * k
        gradients += rows * n
    return BYTES[config.model.dtype] * (sum(inputs.values()) + gradients)


_SHARED_INPUT = {"query": "h", "key": "h", "value": "h", "mlp_gate": "mlp", "mlp_up": "mlp", "router": "mlp"}
_SHARED_INPUT |= {"expert_gate": "rows", "expert_up": "rows"}


def _projections(model: ModelConfig) -> tuple[str, ...]:
    """Return the results of plain matmuls back to the residual stream."""
    return ("attention_out",) if model.moe else ("attention_out", "mlp_out")


def _attention_kept(config: Config, sizes: Sizes, backend: str) -> float:
    """Return the bytes of attention's result and logsumexp.

    Of cuDNN's kernel the policy keeps the result twice: as the primitive's output, which names cannot reach (in latent
    attention padded to the width of queries), and under its name. Within documents, and folded, its derivative is our own.
    """
    is_own = folds(config) or (backend == "cudnn" and config.data.mask_documents)
    by_kernel = max(sizes.query, sizes.result) if backend.startswith("cudnn") and not is_own else 0.0
    statistics = 0.0 if backend == "reference" else FLOAT32 * sizes.statistics
    return BYTES[config.model.dtype] * (by_kernel + sizes.result) + statistics


def _named(config: Config, sizes: Sizes, backend: str) -> dict[str, float]:
    """Return the bytes of each value that remat can keep by name."""
    bytes_each, moe = BYTES[config.model.dtype], config.model.moe
    width = moe.mlp_dim / config.mesh.tensor if moe else 0
    numbers = dict.fromkeys(("mlp_gate", "mlp_up", "mlp_hidden"), bytes_each * sizes.mlp)
    numbers["mlp_gate"] *= is_gated(config.model)
    numbers |= dict.fromkeys(("expert_gate", "expert_up", "expert_hidden"), bytes_each * sizes.rows * width)
    return numbers | {
        "query": bytes_each * sizes.query,
        "key": bytes_each * sizes.key,
        "value": bytes_each * sizes.value,
        "attention": _attention_kept(config, sizes, backend),
        "attention_out": bytes_each * sizes.stream * is_read_again(config.model, "attention_out"),
        "mlp_out": bytes_each * sizes.stream * is_read_again(config.model, "mlp_out"),
        "router": FLOAT32 * sizes.tokens * moe.num_experts if moe else 0.0,
        "expert_in": bytes_each * sizes.rows * config.model.embed_dim,
        "expert_out": bytes_each * sizes.choices * config.model.embed_dim,
    }


def _kept_of_everything(config: Config, sizes: Sizes, backend: str) -> float:
    """Return the bytes that remat none keeps: the inputs of matmuls, norms and activations (`ops/recompute.py`).

    Taking turns keeps attention's projection too, before it is summed over tensor.
    """
    model, bytes_each = config.model, BYTES[config.model.dtype]
    kept = bytes_each * (2 + count_norms(model)) * sizes.stream
    kept += bytes_each * (2 + is_gated(model)) * sizes.mlp
    read = sizes.query + sizes.key + sizes.value
    if model.latent_attention:  # keys with the part that RoPE turns, in each head; values padded to their width for cuDNN
        read = 2 * sizes.query + (sizes.query if backend.startswith("cudnn") else sizes.value)
    kept += bytes_each * read + _attention_kept(config, sizes, backend)
    kept += 2 * bytes_each * sizes.latents
    if sizes.parts > 1 and config.mesh.tensor > 1:
        kept += bytes_each * sizes.sequence
    if model.qk_norm != "none":  # over all heads of tensor it is no norm of one device, and keeps what JAX keeps
        kept += (bytes_each if model.qk_norm == "head" else 3 * FLOAT32) * (sizes.query + sizes.key)
    if backend == "reference":
        kept += (FLOAT32 + bytes_each) * sizes.statistics * config.data.sequence_length
    if model.moe:
        width = model.moe.mlp_dim / config.mesh.tensor
        if sizes.parts == 1 and not model.moe.shared_experts:  # then nobody but the dispatch reads what the norm made
            kept -= bytes_each * sizes.stream
        kept += bytes_each * sizes.rows * (model.embed_dim + 3 * width)
        kept += FLOAT32 * (sizes.stream + sizes.choices * model.embed_dim + 2 * sizes.tokens * model.moe.num_experts)
    return kept
