"""Rows that many families share: embeddings and head, attention, MLP, experts, in the names of Llama's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface.table import Row

LAYER = "model.layers.{layer}."


def linear(ours: str, theirs: str, axes: str, bias: bool = False) -> list[Row]:
    """Return the row of a matrix, and of its bias, whose axes are those on both sides that are not the input's."""
    rows = [Row(ours, f"{theirs}.weight", axes)]
    if bias:
        left, right = (side.strip() for side in axes.split("->"))
        inputs = left.split()[-1]
        rows.append(Row(f"{ours}_bias", f"{theirs}.bias", f"{left[: -len(inputs)]}->{_without(right, inputs)}"))
    return rows


def _without(side: str, axis: str) -> str:
    return side.removeprefix(axis) if side.startswith(axis) else side.removesuffix(axis)


def norm(ours: str, theirs: str, model: ModelConfig) -> list[Row]:
    """Return the rows of a norm over the width."""
    rows = [Row(ours, f"{theirs}.weight", "D -> D")]
    return rows + ([Row(f"{ours}_bias", f"{theirs}.bias", "D -> D")] if model.norm_bias else [])


def outer(model: ModelConfig, table: str = "model.embed_tokens", last: str = "model.norm", head: str = "lm_head") -> list[Row]:
    """Return the rows of the embedding table, the last norm and, where it is not tied, the head."""
    rows = [Row("outer/table", f"{table}.weight", "V D -> V D"), *norm("outer/norm", last, model)]
    return rows if model.tie_embeddings else [*rows, Row("outer/head", f"{head}.weight", "V D -> D V")]


def stack(model: ModelConfig, layer: Callable[[str, bool], list[Row]]) -> list[Row]:
    """Return the rows of all layers; `layer` gives those of one kind: (prefix of our paths, whether it has experts)."""
    first = layer("outer/first_layers/", False) if model.first_dense_layers else []
    return first + layer("layers/", model.moe is not None)


def attention(prefix: str, model: ModelConfig, stem: str = f"{LAYER}self_attn.", pairs: bool = False, out: str = "o_proj"):
    """Return the rows of grouped-query attention without its norms.

    Args:
      pairs: whether their RoPE rotates neighbours, where ours rotates halves.
    """
    ours, qkv, every = f"{prefix}attention/", model.attention_bias != "none", model.attention_bias == "all"
    rows: list[Row] = []
    for name, heads, rotated in (("query", "H", pairs), ("key", "K", pairs), ("value", "K", False)):
        axes = f"({heads} p 2) D -> D {heads} (2 p)" if rotated else f"({heads} N) D -> D {heads} N"
        rows += linear(f"{ours}{name}", f"{stem}{name[0]}_proj", axes, qkv)
    rows += [Row(f"{ours}out", f"{stem}{out}.weight", "D (H N) -> H N D")]
    if every:
        rows += [Row(f"{ours}out_bias", f"{stem}{out}.bias", "D -> D")]
    if model.qk_norm != "none":
        by_head = model.qk_norm == "head"
        rows += [Row(f"{ours}query_norm", f"{stem}q_norm.weight", "N -> N" if by_head else "(H N) -> H N")]
        rows += [Row(f"{ours}key_norm", f"{stem}k_norm.weight", "N -> N" if by_head else "(K N) -> K N")]
    return rows + ([Row(f"{ours}sinks", f"{stem}sinks", "H -> H")] if model.attention_sinks else [])


def mlp(prefix: str, model: ModelConfig, stem: str = f"{LAYER}mlp.") -> list[Row]:
    """Return the rows of a gated MLP without its norms."""
    rows = linear(f"{prefix}mlp/gate", f"{stem}gate_proj", "F D -> D F", model.mlp_bias)
    rows += linear(f"{prefix}mlp/up", f"{stem}up_proj", "F D -> D F", model.mlp_bias)
    return rows + linear(f"{prefix}mlp/down", f"{stem}down_proj", "D F -> F D", model.mlp_bias)


def experts(
    prefix: str,
    model: ModelConfig,
    stem: str = f"{LAYER}mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Row]:
    """Return the rows of a mixture of experts that has a tensor for each expert, without its norms."""
    assert model.moe is not None
    ours, (gate, up, down) = f"{prefix}moe/", names
    rows = [Row(f"{ours}router", f"{stem}gate.weight", "E D -> D E")]
    rows += [Row(f"{ours}gate", f"{stem}experts.{{expert}}.{gate}.weight", "X D -> D X")]
    rows += [Row(f"{ours}up", f"{stem}experts.{{expert}}.{up}.weight", "X D -> D X")]
    rows += [Row(f"{ours}down", f"{stem}experts.{{expert}}.{down}.weight", "D X -> X D")]
    if model.moe.selection_bias:
        rows += [Row(f"{ours}bias", f"{stem}gate.e_score_correction_bias", "E -> E", "float32")]
    if model.moe.shared_experts:
        rows += [Row(f"{ours}shared_gate", f"{stem}shared_experts.gate_proj.weight", "S D -> D S")]
        rows += [Row(f"{ours}shared_up", f"{stem}shared_experts.up_proj.weight", "S D -> D S")]
        rows += [Row(f"{ours}shared_down", f"{stem}shared_experts.down_proj.weight", "D S -> S D")]
    return rows


NORMS = {"attention/norm": "input_layernorm", "mlp/norm": "post_attention_layernorm"}
"""{our norm of a layer: its name in the file}: one before each block."""


def llama(
    model: ModelConfig,
    mixture: Callable[[str, ModelConfig], list[Row]] = experts,
    own_attention: Callable[[str, ModelConfig], list[Row]] = attention,
    own_mlp: Callable[[str, ModelConfig], list[Row]] = mlp,
    norms: Mapping[str, str] = NORMS,
) -> list[Row]:
    """Return the rows of a decoder in Llama's names."""

    def layer(prefix: str, is_mixture: bool) -> list[Row]:
        found = own_attention(prefix, model) + (mixture if is_mixture else own_mlp)(prefix, model)
        for ours, theirs in norms.items():
            found += norm(prefix + (ours.replace("mlp/", "moe/") if is_mixture else ours), LAYER + theirs, model)
        return found

    return outer(model) + stack(model, layer)
