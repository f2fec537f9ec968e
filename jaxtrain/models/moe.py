"""Mixture of experts in place of the MLP.

Shape letters: B batch, L length, T tokens (B L), D embed, E experts, K experts of a token, F an expert's width, S slots.
Inside the manual region E is this device's share over `expert`, F its share over `tensor`, and L its share over `context`.

As in the MLP block, tokens are gathered over `tensor`, and every device along it dispatches the same ones: each sends whole
rows along `expert`, so those bytes are sent `tensor` times. If the experts fit one device, tensor=1 is best.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.config import ModelConfig, MoEConfig
from jaxtrain.models.block import Block
from jaxtrain.models.parameters import parameter
from jaxtrain.ops.activation import activate
from jaxtrain.ops.expert_dispatch import Dispatched, ExpertBackend, combine, dispatch_capacity, dispatch_dropless
from jaxtrain.ops.grouped_matmul import grouped_matmul
from jaxtrain.ops.matmul import multiply
from jaxtrain.ops.router import Routing, balance_loss, expert_load, route, router_z_loss
from jaxtrain.parallel.turns import Turn
from jaxtrain.sharding import all_gather, once, reduce_scatter


class MoE(Block):
    """x + sum_k weight_k expert_k(h) + shared(h), with h = norm(x) and SwiGLU experts: silu(h W_gate) * (h W_up) W_down."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.moe is not None
        self.config, moe = config, config.moe
        d, e, f, shared = config.embed_dim, moe.num_experts, moe.mlp_dim, moe.shared_experts * moe.mlp_dim
        std, out_std, dtype = config.init_std, config.init_std / math.sqrt(2 * config.num_layers), config.param_dtype
        self.declare_norms(rngs, pre=config.residual != "parallel_one_norm")
        self.router = parameter(rngs, (d, e), ("embed", "router"), std, dtype)
        if moe.has_selection_bias:
            self.bias = parameter(rngs, (e,), ("router",), 0.0, dtype)
        self.gate = parameter(rngs, (e, d, f), ("experts", "embed", "mlp"), std, dtype)
        self.up = parameter(rngs, (e, d, f), ("experts", "embed", "mlp"), std, dtype)
        self.down = parameter(rngs, (e, f, d), ("experts", "mlp", "embed"), out_std, dtype)
        if shared:
            self.shared_gate = parameter(rngs, (d, shared), ("embed", "mlp"), std, dtype)
            self.shared_up = parameter(rngs, (d, shared), ("embed", "mlp"), std, dtype)
            self.shared_down = parameter(rngs, (shared, d), ("mlp", "embed"), out_std, dtype)
        if moe.router_bias:
            self.router_bias = parameter(rngs, (e,), ("router",), 0.0)
        if config.mlp_bias:
            self.gate_bias = parameter(rngs, (e, f), ("experts", "mlp_bias"), 0.0)
            self.up_bias = parameter(rngs, (e, f), ("experts", "mlp_bias"), 0.0)
            self.down_bias = parameter(rngs, (e, d), ("experts", "bias"), 0.0)

    @property
    def moe(self) -> MoEConfig:
        """The block's own part of the config."""
        assert self.config.moe is not None
        return self.config.moe

    def __call__(
        self,
        x_BLD: jax.Array,
        onto_BLD: jax.Array | None = None,
        *,
        counted_BL: jax.Array,
        scale: jax.Array,
        backend: ExpertBackend,
        given_BLK: jax.Array | None = None,
    ) -> Turn[tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
        """(x with the block's output added, this device's share of the auxiliary loss, its share of the sums to report).

        Reported are sums over the counted tokens: balance_loss and router_z_loss (without their weights), expert_load (of all
        experts, [E]) and dropped (rows); and where the backend says so `experts`, the choice of each token, [B, L, K].

        Args:
          x_BLD: this device's slice over `tensor`.
          onto_BLD: what the output is added to; by default x.
          counted_BL: bool, over the whole length of this device: whether the token carries a loss.
          scale: float32 scalar: 1 / (counted tokens of the global batch).
          given_BLK: as in `route`, over the whole length of this device.
        """
        x_BLD = yield x_BLD
        own_BLD = self.normed(x_BLD)
        h_BLD = all_gather(own_BLD, "tensor", dim=1)
        with jax.named_scope("router"):
            routing, auxiliary, reports = self._route(own_BLD, counted_BL, scale, given_BLK)
        h_TD, k = h_BLD.reshape(-1, h_BLD.shape[-1]), self.moe.experts_per_token
        with jax.named_scope("dispatch"):
            group = self.moe.group(h_BLD.shape[1])
            dispatched = self._dispatch(h_TD, routing.experts_BLK.reshape(-1, k), group, backend)
        rows = yield checkpoint_name(dispatched.rows, "expert_in")
        matmul = self._expert_matmul(dispatched, backend)
        with jax.named_scope("experts"):
            gate = checkpoint_name(matmul(rows, "gate"), "expert_gate")
        gate = yield gate
        with jax.named_scope("experts"):
            up = checkpoint_name(matmul(rows, "up"), "expert_up")
            hidden = checkpoint_name(activate(self.config, gate, up), "expert_hidden")
        hidden = yield hidden
        with jax.named_scope("experts"):
            made = matmul(hidden, "down")
        with jax.named_scope("combine"):
            back_TKD = checkpoint_name(dispatched.back(made), "expert_out")
            out_TD = combine(back_TKD, routing.weights_BLK.reshape(-1, k))
        out_BLD = out_TD.reshape(h_BLD.shape)
        if self.moe.shared_experts:
            out_BLD = out_BLD + self._shared(h_BLD)
        dropped = ~dispatched.kept_TK & counted_BL.reshape(-1, 1)
        reports |= {"dropped": once(dropped.sum(dtype=jnp.float32), ("tensor",))}
        reports |= {"experts": routing.experts_BLK} if backend.reports_choices else {}
        out_BLD = checkpoint_name(reduce_scatter(out_BLD, "tensor", dim=1), "mlp_out")
        return self.joined(x_BLD if onto_BLD is None else onto_BLD, out_BLD), auxiliary, reports

    def _route(
        self, own_BLD: jax.Array, counted_BL: jax.Array, scale: jax.Array, given_BLK: jax.Array | None
    ) -> tuple[Routing, jax.Array, dict[str, jax.Array]]:
        """Score this device's own slice along tensor: float32 matmuls are slow, and a token's E scores are cheap to send."""
        moe, highest = self.moe, lax.Precision.HIGHEST  # a GPU's default, TF32, would tie different scores
        own32, w32 = own_BLD.astype(jnp.float32), self.router[...].astype(jnp.float32)
        scored_BLE = jnp.einsum("BLD,DE->BLE", own32, w32, precision=highest)
        if moe.router_bias:
            scored_BLE = scored_BLE + self.router_bias[...]
        logits_BLE = checkpoint_name(all_gather(scored_BLE, "tensor", dim=1), "router")
        routing = route(logits_BLE, self.bias[...] if moe.has_selection_bias else None, moe, given_BLK)
        balance, z = balance_loss(routing, counted_BL), router_z_loss(logits_BLE, counted_BL)
        load = expert_load(routing.experts_BLK, counted_BL, moe.num_experts)
        reports = {"balance_loss": balance, "router_z_loss": z, "expert_load": load}
        return routing, scale * (moe.balance_loss * balance + moe.router_z_loss * z), lax.stop_gradient(reports)

    def _dispatch(self, h_TD: jax.Array, experts_TK: jax.Array, group: int, backend: ExpertBackend) -> Dispatched:
        moe = self.moe
        if moe.dispatch == "dropless":
            return dispatch_dropless(h_TD, experts_TK, moe.num_experts, backend, moe.exchange_factor)
        return dispatch_capacity(h_TD, experts_TK, moe.num_experts, group, moe.capacity_factor)

    def _expert_matmul(self, dispatched: Dispatched, backend: ExpertBackend) -> Callable[[jax.Array, str], jax.Array]:
        """Return (dispatched rows, a projection's name) -> each row times its expert's weight, plus its expert's bias."""
        sizes = dispatched.group_sizes

        def times(x: jax.Array, w_EDF: jax.Array) -> jax.Array:
            if sizes is None:
                return multiply("ESD,EDF->ESF", x, w_EDF)
            return grouped_matmul(x, w_EDF, sizes, backend.tile, dispatched.expected_rows)

        def project(x: jax.Array, name: str) -> jax.Array:
            made = times(x, getattr(self, name)[...])
            if not self.config.mlp_bias:
                return made
            bias_EF = getattr(self, f"{name}_bias")[...].astype(x.dtype)
            if name == "down":  # its result is a sum over `tensor`
                bias_EF = once(bias_EF, ("tensor",))
            return made + times(jnp.ones_like(x[..., :1]), bias_EF[:, None])

        return project

    def _shared(self, h_BLD: jax.Array) -> jax.Array:
        gate_BLF = checkpoint_name(multiply("BLD,DF->BLF", h_BLD, self.shared_gate[...]), "mlp_gate")
        up_BLF = checkpoint_name(multiply("BLD,DF->BLF", h_BLD, self.shared_up[...]), "mlp_up")
        hidden_BLF = checkpoint_name(activate(self.config, gate_BLF, up_BLF), "mlp_hidden")
        return multiply("BLF,FD->BLD", hidden_BLF, self.shared_down[...])
