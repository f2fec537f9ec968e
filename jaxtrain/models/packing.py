"""The layers' view of the tokens in a microbatch."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Packing(NamedTuple):
    """A microbatch's facts for a layer, beside its activations."""

    positions: jax.Array
    """int32 [B, L], position of this device's tokens in their documents, from 0."""
    segments: jax.Array | None
    """int32 [B, whole length], document numbers (0: padding) of all tokens along `context`, in the devices' order
    (`share_out`); None if attention may cross documents."""
    counted: jax.Array | None
    """bool [B, L], whether a position carries a loss; None without a loss (sampling)."""
    scale: jax.Array | None
    """float32 scalar: 1 / number of counted positions in the global batch, the factor of every auxiliary loss."""
    lengths: jax.Array | None = None
    """int32 [B, L or 1], tokens of the whole sequence that each token is part of; None if the arrays hold it whole."""
    experts: jax.Array | None = None
    """int32 [B, L, K], the experts that each token goes to in this layer, -1 for the router's own choice; None if all are."""
