"""Control jax's flags that change numbers, so that results depend on config and data, not on the environment.

A flag comes from the environment (JAX_ENABLE_X64=1), from a config file's own code, or from a program that uses jaxtrain as a
library. `NEEDED` holds the value of each: a command sets them for good (`settle`), the library while it computes (`settled`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from jaxtrain.errors import UsageError

NEEDED: dict[str, Any] = {
    "jax_enable_x64": False,  # else float64 and int64 wherever nothing says otherwise
    "jax_numpy_dtype_promotion": "standard",  # strict refuses our own products of two dtypes
    "jax_numpy_rank_promotion": "allow",  # raise refuses those of two ranks
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,  # else other random bits, and other ones on each mesh
    "jax_random_seed_offset": 0,
    "jax_default_matmul_precision": None,  # the model says where it needs more: in the router
    "jax_softmax_custom_jvp": False,
    "jax_disable_jit": False,  # op by op adds up in another order, and shards nothing
}
_NOT_IEEE = re.compile(r"(xla_[cg]pu_(?:enable_fast_math|ftz))(?:=(\S*))?")


def set_aside() -> list[str]:
    """Return "name=value" of each flag that differs from `NEEDED`.

    Raises:
      UsageError: XLA_FLAGS request arithmetic other than IEEE 754's, which can no longer be undone.
    """
    for name, value in _NOT_IEEE.findall(os.environ.get("XLA_FLAGS", "")):
        if value.lower() not in ("false", "0"):
            raise UsageError(
                f"XLA_FLAGS has --{name}: sums and NaNs would depend on it, and a seed would begin otherwise; take it out"
            )
    known = {name: needed for name, needed in NEEDED.items() if name in jax.config.values}
    return [f"{name}={_value(name)}" for name, needed in known.items() if _value(name) != needed]


def settle() -> list[str]:
    """Set every flag as `NEEDED`, for good; return the earlier `set_aside`.

    Raises:
      UsageError: as `set_aside`, or the caller is inside a jax context that fixes a flag, such as `jax.enable_x64()`.
    """
    changed = set_aside()
    for flag in changed:
        name = flag.partition("=")[0]
        jax.config.update(name, NEEDED[name])
    kept = set_aside()
    if kept:
        raise UsageError(f"jax's {', '.join(kept)} would change numbers, and a context of jax keeps it so; leave that context")
    return changed


@contextlib.contextmanager
def settled() -> Iterator[list[str]]:
    """Set every flag as `NEEDED` during the block (or the decorated function); yield the earlier `set_aside`.

    Raises:
      UsageError: as `set_aside`.
    """
    before = {name: _value(name) for name in NEEDED if name in jax.config.values}
    changed = settle()
    try:
        yield changed
    finally:
        for flag in changed:
            name = flag.partition("=")[0]
            jax.config.update(name, before[name])


def _value(name: str) -> Any:
    """Return a flag's value; for an enum, its name."""
    value = getattr(jax.config, name, jax.config.values.get(name))
    return getattr(value, "value", value)
