"""jax's switches that change numbers: what jaxtrain computes is a function of config and data, whatever the environment says.

A switch comes from the environment (JAX_ENABLE_X64=1), from a config file's own code, or from the program that uses jaxtrain as
a library. `FLAGS` says what each must be; a command sets them for good (`settle`), the library while it computes (`settled`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from jaxtrain.errors import ExplainedError

FLAGS: dict[str, Any] = {
    "jax_enable_x64": False,  # float64 and int64 where nothing says otherwise
    "jax_numpy_dtype_promotion": "standard",  # strict refuses our own mixed products
    "jax_numpy_rank_promotion": "allow",  # raise refuses them too
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,  # else other random bits, and other ones on each mesh
    "jax_random_seed_offset": 0,
    "jax_default_matmul_precision": None,  # a model says where it needs more: the router
    "jax_softmax_custom_jvp": False,
    "jax_disable_jit": False,  # op by op adds up in another order, and shards nothing
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",  # XLA's own default
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_use_shardy_partitioner": True,
    "jax_compiler_enable_remat_pass": True,
    "jax_use_direct_linearize": True,
    "jax_allow_f16_reductions": True,
}
"""What each must be. Those that an older or newer jax has not are passed over."""
_NOT_IEEE = re.compile(r"--(xla_(?:cpu|gpu)\w*fast_m(?:ath|in_max)\w*|xla_gpu_ftz)(?:=(\S+))?")
