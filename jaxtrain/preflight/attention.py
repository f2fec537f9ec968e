"""Check the fused attention of the devices: on short packed documents it must agree with the formula, gradients too."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import Config
from jaxtrain.models.building import choose_attention
from jaxtrain.ops.attention import attention
from jaxtrain.ops.attention_mask import Rule
from jaxtrain.preflight.checks import Check, Finding, Site, judge_errors, relative_error

LENGTH, KV_HEADS = 1024, 2
LARGEST_ERROR = 0.02
"""Of the norm of what the formula gives in float32; bfloat16's own rounding makes 0.003 to 0.006."""
NAMES = ("the output", "dQ", "dK", "dV")


def documents(length: int) -> np.ndarray:
    """Return segments [2, length]: a long document, short ones and padding; and more short ones than a kernel's call takes."""
    index = np.arange(length)
    first = np.where(index < length // 2, 1, 2 + index // (length // 16))
    first[-length // 8 :] = 0
    return np.stack([first, 1 + index // 7]).astype(np.int32)


def attention_errors(config: Config, backend: str) -> dict[str, float]:
    """Return the errors of output and gradients against `reference` in float32, each as a share of the norm.

    The heads are as wide as the config's, and as many queries share a key; scores have its scale and window.
    """
    model, latent = config.model, config.model.latent_attention
    group = 1 if latent else model.num_heads // model.num_kv_heads
    wide, value = (model.head_dim + latent.rope_dim, latent.value_dim) if latent else (model.head_dim, model.head_dim)
    random = np.random.default_rng(0)
    heads = ((KV_HEADS * group, wide), (KV_HEADS, wide), (KV_HEADS, value), (KV_HEADS * group, value))
    arrays = [jnp.asarray(random.normal(size=(2, LENGTH, *shape)), model.dtype) for shape in heads]
    window = model.sliding_window if "local" in model.kinds else 0
    rule = Rule(window=min(window, LENGTH // 3), scale=model.attention_scale)
    segments = jnp.asarray(documents(LENGTH)) if config.data.mask_documents else None

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, name: str) -> tuple[jax.Array, ...]:
        attend = functools.partial(attention, backend=name, rule=rule, segments_BL=segments)
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    run = jax.jit(compute, static_argnames="name")
    right = run(*(x.astype(jnp.float32) for x in arrays), name="reference")
    return {name: float(relative_error(a, e)) for name, a, e in zip(NAMES, run(*arrays, name=backend), right, strict=True)}


def look_at_attention(site: Site) -> dict[str, Any]:
    """Return the backend and its errors on this process's first device."""
    backend, _ = choose_attention(site.config, site.mesh)
    with jax.default_device(jax.local_devices()[0]):
        return {"backend": backend, "errors": attention_errors(site.config, backend)}


def judge_attention(site: Site, seen: list[dict[str, Any]]) -> list[Finding]:
    """Name each process whose kernels are wrong, by what is worst."""
    errors = [(f"attention by {facts['backend']}", facts["errors"]) for facts in seen]
    findings, worst = judge_errors(site, "attention", errors, LARGEST_ERROR, "--model.attention=blockwise")
    words = f"{seen[0]['backend']} is within {worst:.2%} of the formula, gradients too"
    return findings or [Finding("attention", "ok", words, {"processes": seen})]


def checks(site: Site) -> list[Check]:
    """Return the single check of attention, if it is cuDNN's: the other backends are the same program on every device."""
    is_fused = choose_attention(site.config, site.mesh)[0].startswith("cudnn")
    return [Check("attention", look_at_attention, judge_attention)] if is_fused else []
