"""Batches that go wrong on purpose: a token in them makes the step's loss and gradients NaN, or a thousand times too large."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.train import step as step_module

NAN, SPIKE = 250, 251  # token ids that no text has: bytes that UTF-8 never uses


def poisonable(monkeypatch: Any) -> None:
    """Train steps that are made from now on look for the two tokens."""
    make = step_module.make_loss_and_gradients

    def made(*arguments: Any) -> Any:
        healthy = make(*arguments)

        def loss_and_gradients(params: Any, batch: Any) -> Any:
            metrics, reports, gradients = healthy(params, batch)
            factor = jnp.where(jnp.any(batch["tokens"] == SPIKE), 1000.0, 1.0)
            factor = jnp.where(jnp.any(batch["tokens"] == NAN), jnp.nan, factor)
            losses = {name: metrics[name] * factor for name in ("loss", "total_loss")}
            return metrics | losses, reports, jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

        return loss_and_gradients

    monkeypatch.setattr(step_module, "make_loss_and_gradients", made)
