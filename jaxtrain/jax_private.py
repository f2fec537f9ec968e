"""The unstable parts of jax: no other file of this package imports `jax._src`.

jax is imported inside the functions, so that importing this module starts nothing. `tests/test_jax_private.py` checks them for
jax 0.10.2 to 0.12.
"""

from __future__ import annotations

from typing import Any


def distributed_state() -> Any:
    """Return jax's record of its coordination service: `client`, `process_id` and `num_processes`, None before it is joined.

    `client` is the key-value store that `jax.experimental.multihost_utils` uses too. jax has no public way to it.
    """
    from jax._src import distributed

    return distributed.global_state


def backends_are_initialized() -> bool:
    """Return whether jax has chosen its devices: from then on, neither the platform nor their number can change."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def user_frame(traceback: Any) -> Any | None:
    """Return the frame (`file_name`, `start_line`) outside jax of an equation's `source_info.traceback`, or None."""
    from jax._src import source_info_util

    return source_info_util.user_frame(traceback)


def fused_attention() -> Any:
    """Return the module of jax's cuDNN primitives (jax/_src/cudnn/fused_attention_stablehlo.py).

    `jax.nn.dot_product_attention(implementation="cudnn")` is their public interface. It rounds the logsumexp to the queries'
    dtype, and has no gradient for a piece of attention.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def scan_carries(parameters: Any) -> slice:
    """Return which operands of a `lax.scan` are carried, from the parameters of its equation; constants come before them."""
    if "num_consts" in parameters:
        return slice(parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"])
    constants, carries, _ = parameters["ft_in"].unpack()  # from jax 0.12 on
    return slice(len(constants), len(constants) + len(carries))
