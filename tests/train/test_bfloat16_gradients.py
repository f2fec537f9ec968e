"""Gradients computed in bfloat16 are those of float32 but for rounding: nothing is summed over tokens in bfloat16."""

from dataclasses import replace

import jax
import numpy as np

from jaxtrain.mesh import make_mesh
from jaxtrain.train.gradients import batch_names, make_loss_and_gradients
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state
from tests.tiny import tiny

ROWS, LENGTH = 16, 256
MODEL = {"embed_dim": 32, "mlp_dim": 48, "qk_norm": "head", "attention_bias": "all", "mlp_bias": True, "norm_bias": True}


def test_no_gradient_is_off_by_more_than_rounding():
    """Of 4,096 tokens. The largest error is 0.026, of a value's bias. With the MLP's weight gradients summed token by token in
    bfloat16 theirs are 0.12 to 0.13: sqrt(4096) / 2^9 or so.
    """
    config = tiny(
        model=MODEL | {"norm": "layer"},
        data={"sequence_length": LENGTH, "mask_documents": False},
        train={"global_batch_size": ROWS, "microbatches": 2, "remat": "none"},
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = create_state(config, mesh, optimizer_of(config))["params"]
    # A head of 20 times the size: predictions that are wrong with certainty make a gradient that does not cancel.
    params["outer"]["head"] = 20 * params["outer"]["head"]
    random = np.random.default_rng(0)
    tokens = random.zipf(1.3, (ROWS, LENGTH + 1)).clip(max=99).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": places}
    batch = {name: arrays[name] for name in batch_names(config)}
    right, found = (
        jax.jit(make_loss_and_gradients(replace(config, model=replace(config.model, dtype=dtype)), mesh, "blockwise"))(
            params, batch
        )[2]
        for dtype in ("float32", "bfloat16")
    )
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(right)[0], jax.tree.leaves(found), strict=True):
        name, a, b = jax.tree_util.keystr(path), np.asarray(a, np.float64), np.asarray(b, np.float64)
        if "key_bias" in name and np.linalg.norm(a) < 1e-6:
            continue  # zero but for rounding: softmax sees no shift
        error, along = np.linalg.norm(b - a) / np.linalg.norm(a), np.vdot(a, b) / np.vdot(a, a)
        assert error < 0.04, (name, error)
        assert abs(along - 1) < 0.03, (name, along)
