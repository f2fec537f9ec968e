"""The moving average of the trained weights: a part of the state, float32, sharded like them.

    e_0 = theta_0,    e_n = e_{n-1} + (1 - d) (theta_n - e_{n-1}),    d = train.ema_decay

(Polyak & Juditsky 1992 for averages of iterates; Izmailov et al. 2018, arXiv:1803.05407, for weights of networks.) A
step that is skipped leaves it as it is, and where replicas differ each has its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.config import Config
from jaxtrain.models.trained import trained, with_trained

PyTree = Any
EMA = "ema"
"""The average's name in the state."""


def first_average(config: Config, params: PyTree) -> PyTree:
    """Return e_0 under its name, as arrays of its own, in a program; nothing where the run keeps none."""
    if not config.train.ema_decay:
        return {}
    return {EMA: jax.tree.map(lambda leaf: jnp.copy(leaf).astype(jnp.float32), trained(config, params))}


def next_average(config: Config, state: PyTree, params: PyTree) -> PyTree:
    """Return e_n under its name, of a state with e_{n-1} and the parameters after step n."""
    if not config.train.ema_decay:
        return {}
    share = 1 - config.train.ema_decay
    changed = trained(config, params)
    return {EMA: jax.tree.map(lambda e, leaf: e + share * (leaf.astype(jnp.float32) - e), state[EMA], changed)}


def with_average(config: Config, state: PyTree) -> PyTree | None:
    """Return the parameters with averages in place of the trained ones; None where the run keeps none."""
    return with_trained(config, state["params"], state[EMA]) if EMA in state else None
