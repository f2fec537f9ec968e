"""The mixture-of-experts block against a plain loop over tokens, on one device and on meshes."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MESH_AXES, MeshConfig, ModelConfig, MoEConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.models.moe import MoE
from jaxtrain.ops.expert_dispatch import ExpertBackend
from jaxtrain.parallel.turns import alone
from jaxtrain.sharding import gather_weights, reduce_gradients, specs, sum_over, vary

BATCH = ("replica", "pipe", "data", "fsdp", "expert")
ROWS, LENGTH, WIDTH, EXPERTS, HIDDEN = 8, 16, 16, 8, 8
PLAIN = MoEConfig(num_experts=EXPERTS, experts_per_token=2, mlp_dim=HIDDEN, balance_loss=0.02, router_z_loss=0.01)
MODEL = ModelConfig(num_layers=2, embed_dim=WIDTH, dtype="float32", moe=PLAIN, init_std=0.5)
DEEPSEEK = replace(
    PLAIN,
    experts_per_token=3,
    shared_experts=2,
    router="sigmoid",
    weight_scale=2.5,
    groups=4,
    groups_per_token=2,
    bias_update_rate=0.001,
)
KINDS = {
    "softmax": PLAIN,
    "deepseek": DEEPSEEK,
    "unnormalised": replace(PLAIN, normalize_weights=False, experts_per_token=1),
    "capacity": replace(PLAIN, dispatch="capacity", capacity_factor=1.0, capacity_group=4),
    "capacity_of_sequence": replace(DEEPSEEK, dispatch="capacity", capacity_factor=0.8),
}


@functools.cache
def module(moe: MoEConfig):
    """(graph, parameters, dims)"""
    graph, state = nnx.split(MoE(replace(MODEL, moe=moe), nnx.Rngs(params=0)), nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    dims = nnx.to_pure_dict(jax.tree.map(lambda p: p.get_metadata()["dims"], state, is_leaf=is_param))
    params = nnx.to_pure_dict(state)
    if "bias" in params:
        params["bias"] = 0.2 * jax.random.normal(jax.random.key(9), params["bias"].shape)
    return graph, params, dims


@functools.cache
def inputs():
    """(x, cotangent of the output, which tokens count): one row counts nothing, the others unequal numbers."""
    rng = np.random.default_rng(0)
    x, ct = rng.normal(size=(2, ROWS, LENGTH, WIDTH)).astype(np.float32)
    counted = rng.random((ROWS, LENGTH)) < rng.random((ROWS, 1))
    counted[3] = False
    return x, ct, counted


def run(moe: MoEConfig, microbatches: int = 1, tile: int = 1, given=None, **mesh_axes: int):
    """(output, total auxiliary loss, reports, gradients of sum(output * cotangent) + auxiliary) on a mesh."""
    mesh_config = MeshConfig(**({"fsdp": 1} | mesh_axes))
    mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(mesh_config.shape))])
    graph, params, dims = module(moe)
    backend = ExpertBackend(ragged=False, tile=tile)

    def region(params, x, ct, counted, given=None):
        params, x, ct, counted, given = vary((params, x, ct, counted, given))
        scale = 1 / sum_over(counted.sum(dtype=jnp.float32), ("replica", "data", "fsdp", "expert", "context"))

        def loss(params, x):
            block = nnx.merge(graph, gather_weights(params, jax.lax.stop_gradient(params), dims, "float32"))
            parts = [
                alone(block(x, counted_BL=c, scale=scale, backend=backend, given_BLK=given))
                for x, c in zip(jnp.split(x, microbatches), jnp.split(counted, microbatches), strict=True)
            ]
            out = jnp.concatenate([part[0] for part in parts])
            auxiliary = sum(part[1] for part in parts)
            reports = jax.tree.map(lambda *leaves: sum(leaves), *[part[2] for part in parts])
            return jnp.sum(out * ct) + auxiliary, (out, auxiliary, reports)

        (_, (out, auxiliary, reports)), (d_params, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return (
            out,
            sum_over((auxiliary), MESH_AXES),
            jax.tree.map(lambda r: sum_over(r, MESH_AXES), reports),
            (
                reduce_gradients(vary(d_params), dims, "float32"),
                dx,
            ),
        )

    rows = P(BATCH, ("context", "tensor"))
    whole = P(BATCH, "context")
    arguments = (params, *inputs(), *(() if given is None else (given,)))
    in_specs = (specs(dims), rows, rows, whole, whole)[: len(arguments)]
    step = jax.shard_map(region, mesh=mesh, in_specs=in_specs, out_specs=(rows, P(), P(), (specs(dims), rows)))
    return jax.tree.map(np.asarray, jax.jit(step).lower(*arguments).compile()(*arguments))


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def loop_over_tokens(moe: MoEConfig, given=None):
    """(output [R, L, D], mask [R, L, E] of the experts that work on each token), float64; by the router or as given."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), module(moe)[1])
    x, _, counted = inputs()
    x = x.astype(np.float64)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_epsilon) * p["norm"]
    logits = h @ p["router"]
    exp = np.exp(logits)
    scores = exp / exp.sum(-1, keepdims=True) if moe.router == "softmax" else 1 / (1 + np.exp(-logits))
    out, mask = x.copy(), np.zeros(scores.shape, bool)
    for s in range(ROWS):
        chosen = []
        for t in range(LENGTH):
            choice = scores[s, t] + p.get("bias", 0)
            size = EXPERTS // moe.groups
            best_of_group = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(moe.groups)]
            closed = np.argsort(best_of_group)[: moe.groups - moe.groups_per_token]
            for g in closed:
                choice[g * size : (g + 1) * size] = -np.inf
            own = np.argsort(-choice)[: moe.experts_per_token]
            chosen.append(own if given is None or given[s, t, 0] < 0 else given[s, t])
        group = (moe.capacity_group or LENGTH) if moe.dispatch == "capacity" else 1
        room = np.ceil(moe.capacity_factor * group * moe.experts_per_token / EXPERTS) if moe.dispatch == "capacity" else 1
        for begin in range(0, LENGTH, group):
            taken = np.zeros(EXPERTS)
            for k in range(moe.experts_per_token):
                for t in range(begin, begin + group):
                    expert = chosen[t][k]
                    mask[s, t, expert] = taken[expert] < room
                    taken[expert] += 1
        for t in range(LENGTH):
            weights = {e: scores[s, t, e] for e in chosen[t]}
            total = sum(weights.values()) if moe.normalize_weights else 1
            for e in chosen[t]:
                hidden = silu(h[s, t] @ p["gate"][e]) * (h[s, t] @ p["up"][e])
                out[s, t] += mask[s, t, e] * moe.weight_scale * weights[e] / total * (hidden @ p["down"][e])
            if moe.shared_experts:
                out[s, t] += (silu(h[s, t] @ p["shared_gate"]) * (h[s, t] @ p["shared_up"])) @ p["shared_down"]
    return out, mask


@functools.cache
def truth(moe: MoEConfig):
    """(output, auxiliary loss, reports, gradients), by autodiff of all experts on all tokens, masked as the loop has it."""
    x, ct, counted = inputs()
    looped, mask = loop_over_tokens(moe)
    per_sequence = counted.sum(1)
    router_mask = loop_over_tokens(replace(moe, dispatch="dropless"))[1]

    def loss(p, x):
        h = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_epsilon) * p["norm"]
        logits = jnp.einsum("sld,de->sle", h, p["router"], precision="highest")
        scores = jax.nn.softmax(logits) if moe.router == "softmax" else jax.nn.sigmoid(logits)
        weights = scores * router_mask
        if moe.normalize_weights:
            weights = weights / weights.sum(-1, keepdims=True)
        hidden = jax.nn.silu(jnp.einsum("sld,edf->slef", h, p["gate"])) * jnp.einsum("sld,edf->slef", h, p["up"])
        out = x + moe.weight_scale * jnp.einsum("slef,efd,sle->sld", hidden, p["down"], weights * mask)
        if moe.shared_experts:
            out = out + (jax.nn.silu(h @ p["shared_gate"]) * (h @ p["shared_up"])) @ p["shared_down"]
        # DeepSeek-V3, equations 17 to 20, sequence by sequence, weighted by the tokens that count.
        shares = scores / scores.sum(-1, keepdims=True)
        balance = 0.0
        for s in range(ROWS):
            n = int(per_sequence[s])
            if n:
                f = EXPERTS / (moe.experts_per_token * n) * router_mask[s][counted[s]].sum(0)
                balance += n / per_sequence.sum() * jnp.sum(f * shares[s][counted[s]].mean(0))
        z = jnp.mean(jnp.log(jnp.exp(logits[counted]).sum(-1)) ** 2)
        auxiliary = moe.balance_loss * balance + moe.router_z_loss * z
        load = router_mask[counted].sum(0)
        dropped = (router_mask & ~mask)[counted].sum()
        sums = {"balance_loss": balance * counted.sum(), "router_z_loss": z * counted.sum()}
        reports = sums | {"expert_load": load, "dropped": dropped}
        return jnp.sum(out * ct) + auxiliary, (out, auxiliary, reports)

    (_, (out, auxiliary, reports)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(module(moe)[1], x)
    np.testing.assert_allclose(out, looped, rtol=1e-5, atol=1e-5)
    return jax.tree.map(np.asarray, (out, auxiliary, reports, gradients))


def assert_close(got, wanted, tolerance: float = 1e-5) -> None:
    """Every leaf to within `tolerance` of its largest number."""

    def leaf(path, a, b):
        assert a.shape == b.shape, path
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3), (path, np.abs(a - b).max(), np.abs(b).max())

    jax.tree_util.tree_map_with_path(leaf, got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_one_device(kind):
    moe = KINDS[kind]
    assert_close(run(moe), truth(moe))
    if moe.dispatch == "capacity":
        assert truth(moe)[2]["dropped"] > 0


MESHES = {
    "expert": {"expert": 8},
    "expert_fsdp_tensor": {"expert": 2, "fsdp": 2, "tensor": 2},
    "expert_context": {"expert": 4, "context": 2},
    "fsdp_context_tensor": {"fsdp": 2, "context": 2, "tensor": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["deepseek", "capacity"])
def test_on_meshes(kind, mesh):
    assert_close(run(KINDS[kind], **MESHES[mesh]), truth(KINDS[kind]))


@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "tensor": 2}])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_neither_auxiliary_losses_nor_gradients(mesh, microbatches):
    """Weights so large that the auxiliary gradients are most of the router's."""
    moe = replace(DEEPSEEK, balance_loss=1000.0, router_z_loss=100.0)
    wanted = truth(moe)
    without = truth(replace(moe, balance_loss=0.0, router_z_loss=0.0))
    assert np.linalg.norm(wanted[3][0]["router"]) > 2 * np.linalg.norm(without[3][0]["router"])
    assert_close(run(moe, microbatches, **mesh), wanted, 1e-6)


@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "context": 2, "tensor": 2}])
def test_experts_that_are_given_replace_the_routers(mesh):
    rng = np.random.default_rng(1)
    given = rng.random((ROWS, LENGTH, EXPERTS)).argsort(-1)[..., : DEEPSEEK.experts_per_token].astype(np.int32)
    given[:, ::3] = -1
    out, mask = loop_over_tokens(DEEPSEEK, given)
    found, _, reports, (gradients, _) = run(DEEPSEEK, given=given, **mesh)
    np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(reports["expert_load"], mask[inputs()[2]].sum(0))
    assert np.abs(gradients["router"]).max() > 0
    assert (loop_over_tokens(DEEPSEEK)[1] != mask).any()


def test_tiles_change_nothing():
    """Groups padded to tiles, as the grouped matmul of GPUs wants them."""
    assert_close(run(DEEPSEEK, tile=8, expert=4), truth(DEEPSEEK))
    assert_close(run(DEEPSEEK, tile=8), truth(DEEPSEEK))
