"""What layers know of the tokens in a microbatch."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Packing(NamedTuple):
    """What a layer needs to know of a microbatch, beside its activations."""

    positions: jax.Array
    """int32 [B, L], position inside its document, from 0, of this device's tokens."""
    segments: jax.Array | None
    """int32 [B, whole length], number of its document, 0 for padding, of all tokens along `context`, in the order in which its
    devices hold them (`share_out`); None when attention may cross documents."""
    counted: jax.Array | None
    """bool [B, L], whether a position carries a loss; None where there is no loss (sampling)."""
    scale: jax.Array | None
    """float32 scalar: 1 / number of counted positions in the global batch, the factor of every auxiliary loss."""
