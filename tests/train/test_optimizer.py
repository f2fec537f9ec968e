"""Optimizers against their plain formulas in numpy, and the law that the layout never changes an update."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import OptimizerConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.sharding import is_dims, spec
from jaxtrain.train.leaf_axes import STACKING, leaf_axes
from jaxtrain.train.muon import orthogonalise
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.schedule import hyperparameters, learning_rate, make_learning_rate, warmup_steps

NAMES = ["adamw", "sgd", "adafactor", "lion", "muon"]
PLAIN = OptimizerConfig(peak_lr=0.1, schedule="constant", weight_decay=0.0, clip_norm=0.0)
EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 6, 2, 1, 4, 10, 12
SIZES = {"embed": EMBED, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "mlp": MLP, "vocab": VOCAB, "norm": EMBED}
LAYER_DIMS = {
    "attention": {
        "norm": ("norm",),
        "query": ("embed", "heads", "head_dim"),
        "query_bias": ("heads", "head_dim"),
        "out": ("heads", "head_dim", "embed"),
    },
    "mlp": {"up": ("embed", "mlp")},
}
OUTER_DIMS = {"table": ("vocab", "embed"), "norm": ("norm",), "head": ("embed", "vocab")}
STACKED_DIMS = jax.tree.map(lambda dims: (*STACKING, *dims), LAYER_DIMS, is_leaf=is_dims)
DIMS = {"outer": OUTER_DIMS, "layers": STACKED_DIMS}
MATRICES = {"table", "head", "query", "out", "up"}
TOLERANCE = 1e-6


def draw(seed, dims_tree, stack=()):
    """A random tree with these dims; `stack` gives the sizes of the stacking dims, if any."""
    rng = np.random.default_rng(seed)

    def leaf(dims):
        shape = (*stack, *(SIZES[name] for name in dims if name not in STACKING))
        return rng.normal(size=shape).astype(np.float32)

    return jax.tree.map(leaf, dims_tree, is_leaf=is_dims)


COMPILED = {}


def compiled(config, dims):
    """The jitted (init, step) of an optimizer, once for a config and a tree of dims."""
    key = config, str(dims)
    if key not in COMPILED:
        optimizer = make_optimizer(config, 10, dims)

        def step(gradients, state, params):
            updates, state = optimizer.update(gradients, state, params)
            return updates, state, optax.apply_updates(params, updates)

        COMPILED[key] = jax.jit(optimizer.init), jax.jit(step)
    return COMPILED[key]


def run(config, params, gradients, dims):
    """The updates of every step, and the state at the end."""
    init, step = compiled(config, dims)
    state, updates = init(params), []
    for g in gradients:
        u, state, params = step(g, state, params)
        updates.append(jax.device_get(u))
    return updates, state


def one_leaf(config, parameter, gradients, dims=("embed", "mlp")):
    updates, _ = run(config, {"w": jnp.asarray(parameter)}, [{"w": jnp.asarray(g)} for g in gradients], {"w": dims})
    return [np.asarray(u["w"]) for u in updates]


def relative(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.fixture
def matrix():
    rng = np.random.default_rng(0)
    return rng.normal(size=(EMBED, MLP)).astype(np.float32), list(rng.normal(size=(3, EMBED, MLP)).astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# The layout never changes the result


def tolerance(name):
    """1e-6, but Muon's five iterations each multiply the rounding of small singular values by up to 3.44: about 1.1e-6."""
    return 1e-5 if name == "muon" else TOLERANCE


def restack(stacked, slots, shape):
    """[layers, ...] -> [chunks, stages, layers per part, ...], layer i in slot slots[i], the other slots zero."""

    def leaf(x):
        full = np.zeros((math.prod(shape), *x.shape[1:]), x.dtype)
        full[slots] = x
        return full.reshape(*shape, *x.shape[1:])

    return jax.tree.map(leaf, stacked)


@functools.cache
def layers_alone(name):
    """Three steps of updates of eight layers, each in an optimizer of its own."""
    config = dataclasses.replace(PLAIN, name=name, weight_decay=0.1)
    params = draw(1, LAYER_DIMS, (8,))
    gradients = [draw(2 + i, LAYER_DIMS, (8,)) for i in range(3)]
    # Layers of very different sizes, so that a statistic taken over several of them would show.
    sizes = 10.0 ** np.arange(-4, 4)

    def scaled(tree):
        return jax.tree.map(lambda x: x * sizes.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32), tree)

    params, gradients = scaled(params), [scaled(g) for g in gradients]

    def alone(i):
        def take(tree):
            return jax.tree.map(lambda x: x[i], tree)

        return run(config, take(params), [take(g) for g in gradients], LAYER_DIMS)[0]

    updates = [jax.tree.map(lambda *x: np.stack(x), *step) for step in zip(*map(alone, range(8)), strict=True)]
    return config, params, gradients, updates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "slots"),
    [
        ((1, 1, 8), range(8)),
        ((2, 2, 2), range(8)),
        ((2, 2, 3), [0, 1, 3, 4, 6, 7, 9, 10]),
    ],
)
def test_an_update_is_the_same_in_every_stacking(name, shape, slots):
    config, params, gradients, expected = layers_alone(name)
    slots = list(slots)
    restacked = [restack(g, slots, shape) for g in gradients]
    updates, state = run(config, restack(params, slots, shape), restacked, STACKED_DIMS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    empty = sorted(set(range(math.prod(shape))) - set(slots))
    for update, reference in zip(updates, expected, strict=True):
        for u, e in zip(jax.tree.leaves(update), jax.tree.leaves(reference), strict=True):
            flat = np.asarray(u).reshape(-1, *u.shape[3:])
            for layer, slot in enumerate(slots):
                assert relative(flat[slot], e[layer]) < tolerance(name)
            assert not np.any(flat[empty])


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_with_clipping_too_two_stackings_agree(name):
    config = dataclasses.replace(PLAIN, name=name, weight_decay=0.1, clip_norm=1.0)
    outer, layers = draw(0, OUTER_DIMS), draw(1, LAYER_DIMS, (8,))
    gradients = [(draw(2 + i, OUTER_DIMS), draw(5 + i, LAYER_DIMS, (8,))) for i in range(2)]
    results = []
    for shape, slots in (((1, 1, 8), list(range(8))), ((2, 2, 3), [0, 1, 3, 4, 6, 7, 9, 10])):
        trees = [{"outer": o, "layers": restack(x, slots, shape)} for o, x in [(outer, layers), *gradients]]
        updates, _ = run(config, trees[0], trees[1:], DIMS)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[slots], updates[-1]["layers"])  # noqa: B023
        results.append(jax.tree.leaves((updates[-1]["outer"], flat)))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < tolerance(name)


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def test_sgd_is_exactly_theta_minus_alpha_times_gradient(matrix):
    theta, gradients = matrix
    config = dataclasses.replace(PLAIN, name="sgd", beta1=0.0, peak_lr=0.3)
    optimizer = make_optimizer(config, 10, {"w": ("embed", "mlp")})
    params = {"w": jnp.asarray(theta)}
    updates, _ = optimizer.update({"w": jnp.asarray(gradients[0])}, optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], theta - np.float32(0.3) * gradients[0])


def test_sgd_with_momentum(matrix):
    theta, gradients = matrix
    updates = one_leaf(dataclasses.replace(PLAIN, name="sgd", beta1=0.8), theta, gradients)
    trace = np.zeros_like(theta)
    for u, g in zip(updates, gradients, strict=True):
        trace = 0.8 * trace + g
        assert relative(u, -0.1 * trace) < TOLERANCE


def test_adamw(matrix):
    theta, gradients = matrix
    config = dataclasses.replace(PLAIN, name="adamw", beta1=0.9, beta2=0.95, epsilon=1e-3, weight_decay=0.1)
    theta, m, v = theta.astype(np.float64), 0.0, 0.0
    for t, (u, g) in enumerate(zip(one_leaf(config, matrix[0], gradients), gradients, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.astype(np.float64) ** 2
        expected = -0.1 * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3) + 0.1 * theta)
        assert relative(u, expected) < TOLERANCE
        theta = theta + expected


def test_lion(matrix):
    theta, gradients = matrix
    m = np.zeros_like(theta)
    for u, g in zip(one_leaf(dataclasses.replace(PLAIN, name="lion", beta2=0.99), theta, gradients), gradients, strict=True):
        np.testing.assert_allclose(u, -0.1 * np.sign(0.9 * m + 0.1 * g), rtol=1e-6)
        m = 0.99 * m + 0.01 * g


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("dims", [("embed", "mlp"), ("norm",), ("heads", "head_dim", "embed")])
def test_adafactor(dims):
    rng = np.random.default_rng(0)
    shape = tuple(SIZES[d] for d in dims)
    theta, gradients = rng.normal(size=shape), rng.normal(size=(3, *shape)) * 10.0 ** np.arange(3).reshape(3, *[1] * len(shape))
    flat = (-1, shape[-1]) if len(dims) > 1 else shape
    row, column, full = 0.0, 0.0, 0.0
    updates = one_leaf(
        dataclasses.replace(PLAIN, name="adafactor"), theta.astype(np.float32), gradients.astype(np.float32), dims
    )
    for t, (u, g) in enumerate(zip(updates, gradients, strict=True), start=1):
        b, g = 1 - t**-0.8, g.reshape(flat)
        if len(dims) > 1:
            row, column = b * row + (1 - b) * (g**2).mean(1), b * column + (1 - b) * (g**2).mean(0)
            direction = g / np.sqrt(np.outer(row, column) / row.mean())
        else:
            full = b * full + (1 - b) * g**2
            direction = g / np.sqrt(full)
        direction = direction / max(1, rms(direction)) * max(1e-3, rms(theta))
        assert relative(u.reshape(flat), -0.1 * direction) < TOLERANCE
        theta = theta + u


def test_adafactor_is_that_of_optax_on_a_plain_matrix(matrix):
    # Where there are more columns than rows, so that optax's largest dim is the output too.
    theta, gradients = matrix
    optimizer = optax.adafactor(0.1, min_dim_size_to_factor=1)
    params = jnp.asarray(theta)
    state = optimizer.init(params)
    for u, g in zip(one_leaf(dataclasses.replace(PLAIN, name="adafactor"), theta, gradients), gradients, strict=True):
        expected, state = optimizer.update(jnp.asarray(g), state, params)
        assert relative(u, expected) < TOLERANCE
        params = params + expected


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 5)])
def test_orthogonalise(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    out = np.asarray(orthogonalise(jnp.asarray(x)))
    for one, result in zip(x, out, strict=True):
        left, _, right = np.linalg.svd(one, full_matrices=False)
        singular = np.diag(left.T @ result @ right.T)
        assert ((singular > 0.4) & (singular < 1.3)).all()
        np.testing.assert_allclose(left.T @ result @ right.T, np.diag(singular), atol=1e-4)


def test_muon_is_that_of_optax_on_each_layer_and_the_rest_is_adamw():
    config = dataclasses.replace(PLAIN, name="muon", weight_decay=0.1)
    outer, layers = draw(0, OUTER_DIMS), draw(1, LAYER_DIMS, (1, 2, 2))
    gradients = [(draw(2 + i, OUTER_DIMS), draw(5 + i, LAYER_DIMS, (1, 2, 2))) for i in range(3)]
    params = {"outer": outer, "layers": layers}
    updates, state = run(config, params, [{"outer": o, "layers": x} for o, x in gradients], DIMS)
    adamw, _ = run(dataclasses.replace(config, name="adamw"), params, [{"outer": o, "layers": x} for o, x in gradients], DIMS)
    for step, reference in zip(updates, adamw, strict=True):
        for u, e in zip(jax.tree.leaves(step["outer"]), jax.tree.leaves(reference["outer"]), strict=True):
            np.testing.assert_array_equal(u, e)
        for name in ("norm", "query_bias"):
            np.testing.assert_array_equal(step["layers"]["attention"][name], reference["layers"]["attention"][name])
    optimizer = optax.contrib.muon(0.1, beta=0.9, weight_decay=0.1, consistent_rms=0.2)
    for part, name, rows in (("attention", "query", EMBED), ("attention", "out", HEADS * HEAD_DIM)):
        one = layers[part][name][0, 1, 0].reshape(rows, -1)
        reference_state, reference_update = optimizer.init(one), jax.jit(optimizer.update)
        for u, (_, g) in zip(updates, gradients, strict=True):
            gradient = g[part][name][0, 1, 0].reshape(rows, -1)
            expected, reference_state = reference_update(gradient, reference_state, one)
            assert relative(u["layers"][part][name][0, 1, 0].reshape(rows, -1), expected) < 1e-5
            one = one + expected
    assert len(jax.tree.leaves(state["muon"].inner_states["muon"].inner_state.momentum)) == 3


def test_gradients_are_clipped_to_the_global_norm(matrix):
    theta, gradients = matrix
    config = dataclasses.replace(PLAIN, name="sgd", beta1=0.0)
    params, gradient = {"a": jnp.asarray(theta), "b": jnp.ones(6)}, {"a": jnp.asarray(gradients[0]), "b": jnp.full(6, 2.0)}
    norm = np.sqrt((gradients[0] ** 2).sum() + 24)
    dims = {"a": ("embed", "mlp"), "b": ("norm",)}
    for clip, factor in ((2.5, 2.5 / norm), (norm * 1.01, 1.0), (0.0, 1.0)):
        (update,), _ = run(dataclasses.replace(config, clip_norm=float(clip)), params, [gradient], dims)
        for name in params:
            assert relative(update[name], -0.1 * factor * gradient[name]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_norms_and_biases_do_not(name):
    params = {"outer": draw(0, OUTER_DIMS), "layers": draw(1, LAYER_DIMS, (1, 1, 2))}
    zero = jax.tree.map(jnp.zeros_like, params)
    (update,), _ = run(dataclasses.replace(PLAIN, name=name, weight_decay=0.5), params, [zero], DIMS)
    for (path, u), p in zip(jax.tree_util.tree_flatten_with_path(update)[0], jax.tree.leaves(params), strict=True):
        factor = 0.05 if path[-1].key in MATRICES else 0.0
        np.testing.assert_allclose(u, -factor * p, rtol=1e-6)


def test_what_a_leaf_is_comes_from_its_dims():
    query = leaf_axes((*STACKING, "embed", "heads", "head_dim"))
    assert (query.layer, query.inputs, query.outputs) == ((3, 4, 5), (3,), (4, 5))
    out = leaf_axes((*STACKING, "heads", "head_dim", "embed"))
    assert (out.inputs, out.outputs) == ((3, 4), (5,))
    expert = leaf_axes((*STACKING, "experts", "embed", "mlp"))
    assert (expert.layer, expert.inputs, expert.outputs) == ((4, 5), (4,), (5,))
    assert leaf_axes(("vocab", "embed")).in_vocabulary
    assert leaf_axes((*STACKING, "embed", "experts")).is_matrix
    for vector in (("norm",), (*STACKING, "norm"), (*STACKING, "heads", "head_dim"), ()):
        assert not leaf_axes(vector).is_matrix


# ---------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("name", NAMES)
def test_state_is_float32_and_mirrors_the_parameters(name):
    params = {"outer": draw(0, OUTER_DIMS), "layers": draw(1, LAYER_DIMS, (1, 2, 2))}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = make_optimizer(dataclasses.replace(PLAIN, name=name), 10, DIMS)
    state = jax.eval_shape(optimizer.init, params)
    shapes = {jax.tree_util.keystr(path): p.shape for path, p in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        text = jax.tree_util.keystr(path)
        owner = next((p for p in shapes if text.endswith(p)), None)
        if owner is None:
            assert leaf.shape == ()
            assert leaf.dtype == jnp.int32
            continue
        assert leaf.dtype == jnp.float32
        if ".row" in text or ".column" in text:
            axes = leaf_axes((*(STACKING if "layers" in text else ()), *dims_of(owner)))
            gone = axes.outputs if ".row" in text else axes.inputs
            assert leaf.shape == tuple(n for i, n in enumerate(shapes[owner]) if i not in gone)
        else:
            assert leaf.shape == shapes[owner]
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.all(jax.tree.map(lambda u: u.dtype == jnp.float32, updates))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def dims_of(path):
    """The dims of the leaf with this path, as `keystr` writes it."""
    first, *keys = re.findall(r"'(\w+)'", path)
    tree = OUTER_DIMS if first == "outer" else LAYER_DIMS
    return functools.reduce(lambda t, key: t[key], keys, tree)


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_one_stage_never_travel_to_another(name):
    dims = {"layers": {"up": (*STACKING, "embed", "mlp"), "out": (*STACKING, "heads", "head_dim", "embed")}}
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(8, 1, 1), ("pipe", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    optimizer = make_optimizer(dataclasses.replace(PLAIN, name=name, weight_decay=0.1), 10, dims)
    params = {"layers": {"up": jnp.zeros((2, 8, 2, 16, 32)), "out": jnp.zeros((2, 8, 2, 4, 8, 16))}}
    shardings = jax.tree.map(lambda d: NamedSharding(mesh, spec(d)), dims, is_leaf=is_dims)

    def step(params, gradients):
        return optimizer.update(gradients, optimizer.init(params), params, mesh=mesh)[0]

    text = jax.jit(step, in_shardings=(shardings, shardings), out_shardings=shardings).lower(params, params).compile().as_text()
    assert not re.search(r"\b(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(-start)?\(", text)
    assert spec(dims["layers"]["up"]) == P(None, "pipe", None, "fsdp", "tensor")


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


SCHEDULE = OptimizerConfig(peak_lr=2.0, warmup_steps=10, final_lr_fraction=0.1, decay_fraction=0.2)
SCHEDULES = ("constant", "cosine", "warmup_stable_decay", "inverse_sqrt")


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 99: 2.0, 1000: 2.0}),
        ("cosine", {0: 0.2, 9: 2.0, 54: 0.2 + 1.8 * 0.5, 99: 0.2, 1000: 0.2}),
        ("warmup_stable_decay", {0: 0.2, 9: 2.0, 50: 2.0, 79: 2.0, 89: 1.1, 99: 0.2, 1000: 0.2}),
        ("inverse_sqrt", {0: 0.2, 9: 2.0, 39: 1.0, 159: 0.5, 999: 0.2}),
    ],
)
def test_schedules(name, points):
    config = dataclasses.replace(SCHEDULE, schedule=name)
    schedule = make_learning_rate(config, 100)
    in_program = jax.jit(functools.partial(learning_rate, (name,)))
    for step, expected in points.items():
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6), step
        assert float(in_program(hyperparameters(config, 100), step)) == pytest.approx(expected, rel=1e-6), step
    assert schedule(jnp.int32(3)).dtype == jnp.float32


def rate_by_hand(config: OptimizerConfig, total: int, step: int) -> float:
    """The docstring's formulas, in float64."""
    n, w, f, p = step + 1, min(config.warmup_steps, total // 2), config.final_lr_fraction, config.peak_lr
    if n <= w:
        return p * n / w
    d = min(max(round(config.decay_fraction * total), 1), total - w)
    fall = {
        "constant": 1.0,
        "cosine": f + (1 - f) * (1 + math.cos(math.pi * min((n - w) / (total - w), 1))) / 2,
        "warmup_stable_decay": 1 - (1 - f) * min(max((n - total + d) / d, 0), 1),
        "inverse_sqrt": math.sqrt(max(w, 1) / n),
    }
    return p if total == 1 else p * fall[config.schedule]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_whole_whatever_its_numbers(name):
    """It begins above 0, climbs to the peak, never falls faster than its slope allows, and ends at the stated rate."""
    shares, finals = (0.0, 0.01, 0.2, 0.5, 0.95, 1.0), (0.0, 0.1, 1.0)
    cases = itertools.product((1, 2, 3, 4, 7, 10, 11, 60), (0, 1, 2, 5, 9, 10, 30, 1000), shares, finals)
    for total, warmup, share, final in cases:
        config = dataclasses.replace(
            SCHEDULE, schedule=name, warmup_steps=warmup, decay_fraction=share, final_lr_fraction=final
        )
        rates = [float(make_learning_rate(config, total)(s)) for s in range(total)]
        assert rates == pytest.approx([rate_by_hand(config, total, s) for s in range(total)], rel=1e-5, abs=1e-6), config
        top, w = max(rates), warmup_steps(config, total)
        peak = rates.index(top)
        assert rates[0] > 0, config
        assert rates[: peak + 1] == sorted(rates[: peak + 1]), config
        assert rates[peak:] == sorted(rates[peak:], reverse=True), config
        if w or total == 1 or name != "cosine":
            assert top == pytest.approx(2) or (name == "warmup_stable_decay" and not w), config
        if total > 1 and name in ("cosine", "warmup_stable_decay"):
            assert rates[-1] == pytest.approx(2 * final, abs=1e-6), config
            decay = total - w if name == "cosine" else min(max(round(share * total), 1), total - w)
            slope = (math.pi / 2 if name == "cosine" else 1) * 2 * (1 - final) / decay
            assert max(a - b for a, b in itertools.pairwise(rates)) <= slope * 1.001 + 1e-6, config


def test_the_first_step_is_taken_at_the_schedules_first_rate(matrix):
    theta, gradients = matrix
    config = dataclasses.replace(PLAIN, name="sgd", beta1=0.0, warmup_steps=4)
    updates = one_leaf(config, theta, gradients)
    for step, (u, g) in enumerate(zip(updates, gradients, strict=True)):
        assert relative(u, -0.1 * (step + 1) / 4 * g) < TOLERANCE


def test_unknown_names_are_explained():
    with pytest.raises(ExplainedError, match=r"optimizer.name='adam': did you mean 'adamw'"):
        make_optimizer(dataclasses.replace(PLAIN, name="adam"), 10, DIMS)  # type: ignore[arg-type]
    with pytest.raises(ExplainedError, match=r"optimizer.schedule='cosin': did you mean 'cosine'"):
        make_learning_rate(dataclasses.replace(PLAIN, schedule="cosin"), 10)  # type: ignore[arg-type]
